"""Decisions -> protobuf."""

from collections.abc import Mapping

from lemix.internal.v1 import scheduler_service_pb2 as pb
from services.scheduler.core.tasks import InferenceTask
from services.scheduler.explain.types import Decision, Fate, Meaning, Outcome

_FATES = {
    Fate.UNFINISHED: pb.DECISION_FATE_UNFINISHED,
    Fate.OK: pb.DECISION_FATE_OK,
    Fate.FAILED: pb.DECISION_FATE_FAILED,
    Fate.CANCELLED: pb.DECISION_FATE_CANCELLED,
    Fate.NODE_LOST: pb.DECISION_FATE_NODE_LOST,
    Fate.REFUSED: pb.DECISION_FATE_REFUSED,
}
_MEANINGS = {
    Meaning.NOTHING: pb.RESPONSE_MEANING_UNSPECIFIED,
    Meaning.FIRST_TOKEN: pb.RESPONSE_MEANING_FIRST_TOKEN,
    Meaning.FORWARD_END: pb.RESPONSE_MEANING_FORWARD_END,
}


def decision_to_proto(decision: Decision) -> pb.Decision:
    """The wire form."""
    message = pb.Decision(
        sequence=decision.sequence,
        at_monotonic_s=decision.at_s,
        policy=decision.policy,
        task_id=decision.task.task_id,
        arrival_monotonic_s=decision.task.arrival_s,
        node_id=decision.node_id,
        refusal=decision.refusal,
        candidates=_candidates(decision),
        waits=waits_to_proto(decision.waits),
        outcome=_outcome(decision.outcome),
        response_meaning=_MEANINGS[decision.meaning],
        predicted_response_s=decision.predicted_s,
        actual_response_s=decision.actual_s,
    )
    task = decision.task
    if isinstance(task, InferenceTask):
        request = pb.DecidedRequest(
            prompt_tokens=task.prompt_tokens, max_tokens=task.max_tokens, session_id=task.session_id
        )
        message.request.CopyFrom(request)
    else:
        microbatch = pb.DecidedMicrobatch(
            job_id=task.job_id, batch=task.batch, length=task.length, parts=decision.parts
        )
        message.microbatch.CopyFrom(microbatch)
    return message


def waits_to_proto(waits: Mapping[str, float]) -> list[pb.TaskWait]:
    """The wire form, in the order in which the reasons were given."""
    return [pb.TaskWait(reason=reason, since_monotonic_s=since_s) for reason, since_s in waits.items()]


def _candidates(decision: Decision) -> list[pb.CandidateTerms]:
    return [
        pb.CandidateTerms(
            node_id=terms.node_id,
            idleness_s=terms.idleness_s,
            response_s=terms.response_s,
            idleness_profit_s=terms.idleness_profit,
            length_consistency=terms.length_consistency,
            score=terms.score,
            kv_share=share,
            cached_tokens=terms.cached_tokens,
        )
        for terms, share in zip(decision.terms, decision.kv_shares, strict=True)
    ]


def _outcome(outcome: Outcome) -> pb.DecisionOutcome:
    return pb.DecisionOutcome(
        fate=_FATES[outcome.fate],
        first_op_monotonic_s=outcome.first_op_s,
        first_token_monotonic_s=outcome.first_token_s,
        forward_end_monotonic_s=outcome.forward_end_s,
        ended_monotonic_s=outcome.ended_s,
        output_tokens=outcome.output_tokens,
    )
