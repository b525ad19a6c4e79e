"""Results as one self-contained HTML page."""

from listener_reward.report.page import write_report

__all__ = ["write_report"]
