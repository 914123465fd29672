"""How far predicted times to first token were from the real ones."""

from services.simulator.types import SimulationResult


def ttft_errors(result: SimulationResult) -> list[float]:
    """Absolute error of every time to first token predicted at placement, as a share of the real one."""
    predicted_s = {
        decision.task_id: terms.response_s
        for decision in result.decisions
        for terms in decision.terms
        if terms.node_id == decision.node_id
    }
    return [
        abs(predicted_s[task_id] - ttft_s) / ttft_s
        for task_id, record in result.tasks.items()
        if record.first_token_s is not None and (ttft_s := record.first_token_s - record.work.arrival_s) > 0.0
    ]
