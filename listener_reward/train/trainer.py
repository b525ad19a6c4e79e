"""`ListenerGRPOTrainer`: trl's GRPO with the listener's reward, shared prefixes, and a resume that is exact.

These methods of trl and transformers are overridden, each for the reason in its docstring. Switches in
`ListenerGRPOConfig` leave the work to trl: `_generate_and_score_completions`, `_generate_single_turn`,
`_prepare_inputs`, `_get_per_token_logps_and_entropies`; `_get_train_sampler`, `_load_from_checkpoint`. Three have none:
`train`, `_save_checkpoint` and `__init__`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import RepeatSampler

from listener_reward.chat import reserved_tokens
from listener_reward.checkpoints import saving
from listener_reward.errors import InputError
from listener_reward.listener import Listener, make_listener
from listener_reward.media.images import to_pil
from listener_reward.models.processing import decoded, opened_by_template
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.models.vlm import check_finite
from listener_reward.pairs import prompt_with
from listener_reward.prefix.allocator import keep_freed_memory
from listener_reward.prefix.attention import base_model, take_layouts, unsupported
from listener_reward.trace import Trace
from listener_reward.train.chats import as_chats
from listener_reward.train.config import ListenerGRPOConfig, without_image_token
from listener_reward.train.guard import changes, lacks_fused_head
from listener_reward.train.listening import load_audience
from listener_reward.train.policy import Policy
from listener_reward.train.reloading import keeping_weights
from listener_reward.train.resuming import check_resumable, check_revision, last_checkpoint
from listener_reward.train.rewards import ShapedReward
from listener_reward.train.sharing import (
    micro_batches,
    replaced,
    shared_logprobs,
    shared_rollouts,
    shuffle_groups,
    unsharded,
    without_images,
)

logger = logging.getLogger(__name__)


class ListenerGRPOTrainer(GRPOTrainer):
    """Trains a reasoner to answer right and to convince a listener (arXiv 2506.22832).

    Args:
        model: the reasoner's checkpoint: a folder, a Hub name, or an embedded name such as "tiny-base".
        args: the configuration.
        train_dataset: pairs as `load_pairs` gives them, columns `prompt, images, p_first, id`.
        eval_dataset: the same, for trl's own evaluation; usually left out in favour of `evaluate`.
        listener: a listener that is already loaded; None loads the one that `args.listener` names.
        peft_config: a LoRA configuration; None trains every weight.
        callbacks: as for transformers' `Trainer`.

    Raises:
        InputError: too few pairs for one step, missing columns, or a checkpoint or listener that cannot be loaded.
        JudgeError: the listener already fails on the first pair, before anything is trained.
    """

    _tag_names = ("trl", "grpo", "listener-reward")
    _name = "Listener-shaped GRPO"
    args: ListenerGRPOConfig

    def __init__(
        self,
        model: str | Path,
        args: ListenerGRPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        *,
        listener: Listener | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        policy = Policy.open(model, args)
        self.base_folder, self.revision = policy.folder, policy.revision
        self.kernel = self._kernel(args)
        audience = load_audience(policy, args, listener, adapters=peft_config is not None, kernel=self.kernel)
        self.card = policy.card if audience.name is None else replace(policy.card, listener=audience.name)
        _check_size(train_dataset, args)
        self._malformed_rounds = 0
        """Rounds in a row, up to now, in which every completion was malformed."""
        self._said_cut = False
        self.left_to_trl = changes()
        """Switches without effect in this version of trl, each with the reason."""
        self.reward = ShapedReward(
            self.card.format,
            audience.listener,
            on_failure=args.listener_on_failure,
            opened=opened_by_template(policy.processor, self.card.format),
            gain=args.gain_weight > 0,
        )
        args = self._settled(args, policy)
        if peft_config is not None and self.revision is not None:
            peft_config.revision = self.revision  # which the adapter then names with its base
        as_trl_has_them = partial(
            as_chats,
            card=self.card,
            reserved=reserved_tokens(policy.processor.tokenizer),
            decode="decode_images_once" in self.left_to_trl,  # then trl decodes
        )
        with self._class_of_revision(), keeping_weights(args):
            super().__init__(
                model=policy.folder,
                reward_funcs=self.reward.functions,  # pyright: ignore[reportArgumentType]
                args=args,
                train_dataset=as_trl_has_them(train_dataset),
                eval_dataset=None if eval_dataset is None else as_trl_has_them(eval_dataset),
                processing_class=policy.processor,
                peft_config=peft_config,
                callbacks=callbacks,
            )
        self.listener = self._own_base() if audience.own_base else audience.listener
        self.reward.listener = self.listener
        if self.listener is not None:
            self._probe(self.listener, train_dataset[0])
        self.sharing = self._what_is_shared()
        if self.sharing:
            self._prepare_for_sharing()

    def _settled(self, args: ListenerGRPOConfig, policy: Policy) -> ListenerGRPOConfig:
        """The configuration for trl: a weight for each reward function, and no image tokens from vLLM.

        Raises:
            InputError: vLLM would load another revision of the policy.
        """
        if args.use_vllm and args.vllm_mode == "colocate" and self.revision is not None:
            raise InputError(
                f"revision {self.revision!r} of the policy is asked for, and trl has vLLM load it by its name alone, "
                "the newest; download the revision and give its folder, or set use_vllm: false"
            )
        if args.use_vllm:
            given: Any = args.generation_kwargs
            args.generation_kwargs = without_image_token(given, policy.processor.image_token_id)
        if args.gain_weight:
            args = copy.copy(args)  # the caller's has three weights, and may be used again
            args.reward_weights = args.all_weights
        return args

    def _class_of_revision(self) -> contextlib.AbstractContextManager[Any]:
        """Stock trl looks up the policy's class in the newest `config.json`, whatever revision it then loads."""
        if self.revision is None:
            return contextlib.nullcontext()
        stock: Any = grpo_trainer.create_model_from_path
        chosen = partial(stock, architecture=AutoModelForImageTextToText)
        return replaced(grpo_trainer, "create_model_from_path", chosen)

    @staticmethod
    def _kernel(args: ListenerGRPOConfig) -> str:
        """How shared rows' attention is computed, one of `attention.KERNELS`: as configured, where that can train."""
        if args.share_attention == "flex" and args.device.type == "cpu":
            logger.warning("share_attention is 'flex', but 'sdpa' runs, because FlexAttention trains on GPUs alone")
            return "sdpa"
        return args.share_attention

    def _sharded(self) -> bool:
        """Whether each process holds a part of the weights only: FSDP, or DeepSpeed's ZeRO-3."""
        deepspeed = self.accelerator.state.deepspeed_plugin
        return self.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3)

    def _own_base(self) -> Listener:
        """The policy with its adapters off as the listener.

        Raises:
            InputError: the weights are sharded. Processes run different numbers of listener passes, but gather sharded
                weights together.
        """
        if self._sharded():
            raise InputError(
                "listener is 'base', the policy's own weights, and this launch shards them (FSDP or ZeRO-3); name a "
                "checkpoint as the listener, which every process then holds whole, or launch with DDP or ZeRO-2"
            )
        base = TransformersVLM(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            batch_size=self.args.listener_batch_size,
            adapters_off=True,
            shared_prefix=self.args.share_listener,
            token_budget=self.args.token_budget,
            attention=self.kernel,
            think_tag=self.card.format.think[0],
        )
        return make_listener(base, self.card.format, self.card)

    def _probe(self, listener: Listener, pair: dict[str, Any]) -> None:
        """Asks the listener once before training, so that a broken listener stops the run here."""
        first, second = (to_pil(image, field="images") for image in pair["images"])
        asked = prompt_with(pair["prompt"], pair.get("sources"), pair.get("criterion"))
        chat = listener.chat_format.chat(asked, first, second, listener.vlm.reserved)
        check_finite(listener.p_first([chat], [Trace("", None)]), "the listener")
        _forget_images(listener)

    # ------------------------------------------------------------------------------------------------------- images
    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        """Decodes images with `to_pil`, and each image once for the G rows of its group.

        Stock trl lets `datasets` decode every row, so the same picture G times, and keeps any colour mode. The listener
        forgets the round's images afterwards: they would pile up in memory over the rounds.
        """
        if "decode_images_once" not in self.left_to_trl:
            args, kwargs = (self._decoded(*args, **kwargs),), {}
        try:
            with self._light_gathering(), self._tags_kept():
                scored = super()._generate_and_score_completions(*args, **kwargs)
        finally:
            if self.listener is not None:
                _forget_images(self.listener)
        self._warn_where_completions_are_cut()
        self._stop_where_all_is_malformed()
        return scored

    def _warn_where_completions_are_cut(self) -> None:
        """Says once that at least half of a round's completions end at `max_completion_length`. What is cut before its
        answer is malformed, and earns less than any short thought: training would teach not to think."""
        cut = self._metrics["train"].get("completions/clipped_ratio")
        if cut and cut[-1] >= 0.5 and not self._said_cut:
            self._said_cut = True
            logger.warning(
                "%.0f %% of a round's completions are cut at max_completion_length %s; one that is cut before its "
                "answer earns nothing, so that thoughts become short. Give a larger max_completion_length",
                100 * cut[-1],
                self.args.max_completion_length,
            )

    def _stop_where_all_is_malformed(self) -> None:
        """Counts rounds without a well-formed completion on any process, and ends a run that has only such.

        Raises:
            InputError: `malformed_rounds` of them in a row.
        """
        rates = self._metrics["train"].get("malformed_rate")
        if not (self.model is not None and self.model.training and rates):
            return
        self._malformed_rounds = self._malformed_rounds + 1 if rates[-1] == 1 else 0
        if 0 < self._malformed_rounds == self.args.malformed_rounds:
            raise InputError(
                f"all completions of {self._malformed_rounds} rounds in a row are malformed, such as "
                f"{self.reward.last_completion[:500]!r}; they earn nothing, so nothing is learnt. Give the checkpoint "
                "a card (listener_reward.json) with the tags and labels that it writes (`listener-reward card` finds "
                "them), a larger max_completion_length where completions are cut, or some supervised steps first "
                "(train_sft); malformed_rounds: 0 goes on"
            )

    def _decoded(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        decoded: dict[Any, Any] = {}

        def picture(image: Any) -> Any:
            if not self.args.decode_images_once:
                return to_pil(image, field="images")
            key = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else id(image)
            if key not in decoded:
                decoded[key] = to_pil(image, field="images")
            return decoded[key]

        return [{**row, "images": [picture(image) for image in row["images"]]} for row in inputs]

    def _tags_kept(self) -> contextlib.AbstractContextManager[Any]:
        """Stock trl drops every special token from completions, tags that were added as such among them."""
        processor: Any = self.processing_class

        def decode(ids: Any, **_: Any) -> list[str]:
            return decoded(processor.tokenizer, ids)

        return replaced(processor, "batch_decode", decode)

    def _light_gathering(self) -> contextlib.AbstractContextManager[Any]:
        """Leaves pictures out of gathering: stock trl sends every prompt with its pictures to every process for its
        table of completions."""
        wanted = self.args.gather_images or self.args.log_multimodal or "gather_images" in self.left_to_trl
        if wanted or self.accelerator.num_processes == 1:
            return contextlib.nullcontext()
        stock = grpo_trainer.gather_object
        return replaced(grpo_trainer, "gather_object", lambda values: stock(without_images(values)))

    # ------------------------------------------------------------------------------------------------- shared prefixes
    def _prepare_for_sharing(self) -> None:
        for model in (self.model, self.ref_model):
            if model is not None:
                take_layouts(self.accelerator.unwrap_model(model))
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()

    def _what_is_shared(self) -> frozenset[str]:
        """The parts of a step that compute a prompt once. Warns of each part that falls back, with the reason."""
        wanted = {name for name in ("rollout", "logprobs", "groups") if getattr(self.args, f"share_{name}")}
        policy = self.accelerator.unwrap_model(self.model)
        reason = unsupported(policy)
        fsdp: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None  # else there is no such name
        if fsdp is not None and fsdp.fsdp_version == 1:
            reason = reason or "FSDP version 1 flattens the weights; fsdp_version: 2 keeps the layers"
        fallen = dict.fromkeys(("share_rollout", "share_logprobs", "share_groups"), reason) if reason else {}
        if self.use_vllm:
            fallen.setdefault("share_rollout", "vLLM samples, and shares prefixes by itself")
        if getattr(self, "aux_loss_enabled", False):  # not in every trl
            fallen.setdefault("share_logprobs", "the load-balancing loss of experts wants every copy")
        fallen = self.left_to_trl | fallen
        if lacking := lacks_fused_head(base_model(policy)):
            fallen.setdefault("share_logprobs", lacking)
        for switch in sorted(fallen):
            ours = switch != "gather_images"  # of this one, off is what trl does not have
            if getattr(self.args, switch) == ours:
                state = "on" if ours else "off"
                logger.warning("%s is %s, but trl's own code runs, because %s", switch, state, fallen[switch])
        return frozenset(name for name in wanted if f"share_{name}" not in fallen)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Prefills each prompt once for its G completions; the tokens are those of stock trl with the same seed."""
        if "rollout" not in self.sharing:
            return super()._generate_single_turn(*args, **kwargs)
        policy = self.accelerator.unwrap_model(self.model)
        with shared_rollouts(policy, self.args.token_budget, synced=self._sharded()):
            return super()._generate_single_turn(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Shuffles a generation round by whole groups, so that a micro-batch can share its prompts."""
        if "groups" not in self.sharing:
            return super()._prepare_inputs(*args, **kwargs)
        with replaced(grpo_trainer, "shuffle_sequence_dict", shuffle_groups):
            return super()._prepare_inputs(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Log-probabilities of the policy, the old policy and the reference, and the loss: one row for each group."""
        if "logprobs" not in self.sharing:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._logprobs_of_groups(*args, **kwargs)

    def _logprobs_of_groups(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **vision: Any,
    ) -> Any:
        parts = [
            shared_logprobs(
                model,
                *batch,
                self.accelerator.autocast,
                token_budget=self.args.token_budget,
                kernel=self.kernel,
                synced=self._sharded(),
            )
            for batch in micro_batches(input_ids, attention_mask, logits_to_keep, batch_size, vision)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies) if compute_entropy else None, None

    # ------------------------------------------------------------------------------------------------------- resume
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, from a checkpoint's folder, or with True from the newest whole one in `output_dir`.

        Stock transformers takes the newest by its name, however its writing ended.

        Raises:
            InputError: the checkpoint that is named is broken; the message says which is the last whole one.
            OSError: the disk is full; the message says the same.
        """
        if resume_from_checkpoint is True:
            tell = logger.warning if self.accelerator.is_main_process else None
            newest = last_checkpoint(self.args.output_dir or ".", tell)
            resume_from_checkpoint = True if newest is None else str(newest)  # True: transformers says there is none
        elif resume_from_checkpoint:
            check_resumable(resume_from_checkpoint)
        if isinstance(resume_from_checkpoint, str | Path):
            check_revision(resume_from_checkpoint, self.revision)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """trl's sampler, with a permutation that is a function of seed and epoch.

        Stock trl draws permutations from one generator, which a resumed run starts afresh. So a run resumed in its
        second epoch sees the first epoch's order.
        """
        sampler = super()._get_train_sampler(*args, **kwargs)
        return EpochSampler(sampler) if self._resumes_exactly() and isinstance(sampler, RepeatSampler) else sampler

    def _resumes_exactly(self) -> bool:
        return self.args.exact_resume and "exact_resume" not in self.left_to_trl

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Loads full fine-tuned weights through `from_pretrained`, which knows their saved names.

        Stock transformers loads a Qwen2.5-VL checkpoint with `load_state_dict(strict=False)`, whose keys do not match
        those that `save_pretrained` wrote: all but the head silently keep their initial weights.
        """
        elsewhere = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if elsewhere or not self._resumes_exactly() or not self._load_whole(*args, **kwargs):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_whole(self, resume_from_checkpoint: str, model: Any = None) -> bool:
        """Loads full weights. False for a model with adapters, whose checkpoint has the adapters only."""
        target = self.accelerator.unwrap_model(model if model is not None else self.model)
        if hasattr(target, "peft_config"):
            return False
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict(), strict=True)
        return True

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Adds the card, so that a checkpoint is a judge (an adapter on its base, with LoRA), and marks it as complete.

        `last_checkpoint` reads the mark: the trainer's state, which transformers writes last. An earlier run's state is
        removed first.

        Raises:
            OSError: the disk is full; what was written of this checkpoint is removed.
        """
        run = Path(self._get_output_dir(trial=trial))
        folder = Path(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with saving(run, lambda: last_checkpoint(run), remove=folder):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                self.card.save(folder)
            super()._save_checkpoint(model, trial)

    # -------------------------------------------------------------------------------------------------------- result
    def save_judge(self, folder: str | Path) -> None:
        """Writes a folder that `Judge.from_pretrained` and plain transformers load, from the main process.

        Every process has to call it: sharded weights are gathered by all of them, and none goes on, perhaps to leave,
        before the folder is there. Of a LoRA run the folder holds the adapter, as PEFT writes it, and the name of the
        base; it is not merged, which in bfloat16 would round most of a small update away. `listener-reward merge`
        merges it and says what that costs.

        Raises:
            OSError: the disk is full; the message names the last whole checkpoint.
        """
        whole: Any = self.accelerator.get_state_dict(self.model_wrapped) if self._sharded() else None
        if self.accelerator.is_main_process:
            with saving(Path(folder), lambda: last_checkpoint(self.args.output_dir or ".")):
                self._write_judge(folder, whole)
        self.accelerator.wait_for_everyone()

    def _write_judge(self, folder: str | Path, gathered: dict[str, torch.Tensor] | None) -> None:
        """`gathered` has all weights where this process's model holds a part only."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "peft_config"):
            model.save_pretrained(folder, state_dict=gathered)
        else:
            (model if gathered is None else self._made_whole(gathered)).save_pretrained(folder)
        self.processing_class.save_pretrained(folder)  # pyright: ignore[reportOptionalMemberAccess]
        self.card.save(folder)

    def _made_whole(self, gathered: dict[str, torch.Tensor]) -> Any:
        """What training started from, loaded anew and whole, with the trained weights.

        Saving the sharded model with the gathered weights would not do: what is tied has become two, and of a model
        loaded under ZeRO-3 transformers 5.23 saves a Qwen2.5-VL as `model.model.*`.
        """
        sharded: Any = base_model(self.accelerator.unwrap_model(self.model))
        with unsharded():
            model = type(sharded).from_pretrained(self.base_folder, dtype=sharded.dtype, revision=self.revision)
        model.load_state_dict(gathered)
        return model


class EpochSampler(torch.utils.data.Sampler[int]):
    """trl's `RepeatSampler`, shuffled anew from (seed, epoch)."""

    def __init__(self, sampler: RepeatSampler):
        self.sampler = sampler
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed((self.sampler.seed or 0) + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def _forget_images(listener: Listener) -> None:
    if isinstance(listener.vlm, TransformersVLM):
        listener.vlm.features.clear()


def _check_size(pairs: Dataset, args: ListenerGRPOConfig) -> None:
    """Refuses data that is too small for one step: trl would silently train for no step at all."""
    assert args.generation_batch_size and args.num_generations  # trl has filled them in
    needed = args.generation_batch_size // args.num_generations
    if len(pairs) < needed:
        raise InputError(
            f"train_dataset has {len(pairs)} pairs and one generation round takes {needed}; give more pairs, or lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )
