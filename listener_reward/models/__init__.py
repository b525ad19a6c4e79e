"""Vision-language models: what is asked of one (`vlm`), who runs it, and where its weights come from."""
