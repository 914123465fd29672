"""One colour per policy, the same in every chart."""

_POLICY_COLORS = {
    "separate": "#1b9e77",
    "round_robin": "#d3622a",
    "paper_additive": "#a05cc0",
    "paper_ratio": "#b58900",
    "paper_released": "#c2588f",
    "lemix": "#1f6fb5",
    "lemix_no_sync": "#7fb8e6",
    "lemix, fast_forward": "#1b2f5c",
    "least_loaded": "#8c6d46",
    "least_utilised": "#4a4a4a",
    "queue_work": "#6b7f3a",
    "random": "#a3a3a3",
    "separate_dynamic": "#7fcdb4",
}
_OTHER_COLORS = ("#6b7f3a", "#8c6d46", "#888888")


def policy_color(name: str) -> str:
    """The colour of a policy in every chart."""
    return _POLICY_COLORS.get(name) or _OTHER_COLORS[sum(name.encode()) % len(_OTHER_COLORS)]
