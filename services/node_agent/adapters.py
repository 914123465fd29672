"""Adapters of this node: which there are, who may use them, and when one that nobody wants any more can go."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping

from lemix.errors import ErrorCode, LemixError
from services.node_agent.engine.training_ops import AdapterSpec
from services.node_agent.tasks import MicrobatchTask, RequestTask, Task

#: Adapters remembered as unwanted, for work that is still on its way here.
_MAX_UNWANTED = 1024


class NodeAdapters:
    """No I/O. `on_change` is called when `held` has changed."""

    def __init__(self, max_adapters: int) -> None:
        self._max_adapters = max_adapters
        #: From the first micro-batch taken; on all stages.
        self._expected: dict[str, AdapterSpec] = {}
        self._held: dict[str, AdapterSpec] = {}
        #: Unix time of the newest step of each, seconds; of the weights below them all under no name.
        self._trained_unix_s: dict[str, float] = {}
        #: With the newest attempt of its job that was seen here: a later one may make it anew.
        self._unwanted: OrderedDict[str, int] = OrderedDict()
        self._attempts: dict[str, int] = {}
        #: Those that are still to be freed: unwanted, or never made.
        self._leaving: set[str] = set()
        self.on_change: Callable[[], None] = lambda: None
        #: Whether the weights below are no longer those of the model directory.
        self.weights_changed = False

    @property
    def held(self) -> Mapping[str, AdapterSpec]:
        """Adapters that every stage has, by id."""
        return self._held

    @property
    def trained_unix_s(self) -> Mapping[str, float]:
        """When the newest step of each was made, unix time in seconds; of the weights below them under no name."""
        return self._trained_unix_s

    # ------------------------------------------------------------- work

    def admit(self, task: Task) -> None:
        """A task comes; the stages make the adapter that it trains if it is new.

        Raises LemixError MODEL_NOT_FOUND, CANCELLED (the model of its job was deleted), RESOURCE_EXHAUSTED (too many
        adapters) or CONFLICT (there is another one of that name).
        """
        if isinstance(task, RequestTask):
            if task.adapter_id and (task.adapter_id not in self._held or task.adapter_id in self._unwanted):
                raise LemixError(ErrorCode.MODEL_NOT_FOUND, f"this node holds no adapter {task.adapter_id}")
        elif task.adapter is not None:
            self._want_again(task.adapter.adapter_id, task.attempt)
            self.expect(task.adapter)
            self._attempts[task.adapter.adapter_id] = task.attempt

    def _want_again(self, adapter_id: str, attempt: int) -> None:
        """Its job may have gone on. What is left of the adapter of before has to go first."""
        if attempt > self._unwanted.get(adapter_id, attempt) and adapter_id not in self._leaving:
            del self._unwanted[adapter_id]

    def expect(self, spec: AdapterSpec) -> None:
        """The stages will make it if it is new. Raises LemixError as `admit`."""
        self.check(spec.adapter_id)
        known = self._expected.get(spec.adapter_id)
        if known is None and len(self._expected) >= self._max_adapters:
            message = f"this node holds {len(self._expected)} adapters, its max_adapters; delete a model"
            raise LemixError(ErrorCode.RESOURCE_EXHAUSTED, message)
        if known is not None and known != spec:
            raise LemixError(ErrorCode.CONFLICT, f"adapter {spec.adapter_id} is another one on this node")
        self._expected[spec.adapter_id] = spec
        self._leaving.discard(spec.adapter_id)

    def is_unwanted(self, adapter_id: str) -> bool:
        """Whether nobody may use it any more."""
        return adapter_id in self._unwanted

    def check(self, adapter_id: str) -> None:
        """Raises LemixError CANCELLED when nobody may use this adapter any more."""
        if adapter_id in self._unwanted:
            raise LemixError(ErrorCode.CANCELLED, "the model of its job was deleted")

    def made(self, spec: AdapterSpec) -> None:
        """Every stage has it."""
        if spec.adapter_id not in self._held and spec.adapter_id not in self._unwanted:
            self._held[spec.adapter_id] = self._expected[spec.adapter_id] = spec
            self._leaving.discard(spec.adapter_id)
            self.on_change()

    def loaded(self, spec: AdapterSpec | None, trained_unix_s: float | None) -> None:
        """Every stage has taken over weights (None), or this adapter, with a newest step of that time."""
        if spec is None:
            self.weights_changed = True
        else:
            self.made(spec)
        adapter_id = "" if spec is None else spec.adapter_id
        if trained_unix_s is not None and (not adapter_id or adapter_id in self._held):
            self._trained_unix_s[adapter_id] = trained_unix_s

    def adopt(
        self,
        specs: Iterable[AdapterSpec],
        tasks: Iterable[Task],
        *,
        weights_changed: bool,
        trained_unix_s: Mapping[str, float],
    ) -> None:
        """The stages have restored these on top of such weights, and kept other isolated ones. Micro-batches make
        theirs anew."""
        self.weights_changed = weights_changed
        restored = {spec.adapter_id: spec for spec in specs}
        kept = {name: spec for name, spec in self._held.items() if spec.isolated and name not in restored}
        times = {name: unix_s for name, unix_s in self._trained_unix_s.items() if name in kept}
        self._trained_unix_s = {**times, **trained_unix_s}
        self._held = {**kept, **restored}
        trained = [task.adapter for task in tasks if isinstance(task, MicrobatchTask) and task.adapter is not None]
        self._expected = {spec.adapter_id: spec for spec in trained} | self._held
        self._attempts = {name: attempt for name, attempt in self._attempts.items() if name in self._expected}
        # One that was deleted after the checkpoint goes once more.
        self._leaving = {adapter_id for adapter_id in self._expected if adapter_id in self._unwanted}
        self.on_change()

    # ------------------------------------------------------------- steps

    def stepped(self, job_id: str, unix_s: float) -> None:
        """A job made an optimizer step: in its adapter, if it has one, else in the weights."""
        if job_id in self._expected:
            self._trained_unix_s[job_id] = unix_s
        else:
            self.weights_changed = True
            self._trained_unix_s[""] = unix_s

    def newest_step(self, adapter_id: str, in_model: float | None) -> float | None:
        """Unix time of the newest step in what serves a request, None: there was none; `in_model`: in the served model.

        Below an isolated adapter lie the weights alone: other adapters make it no newer.
        """
        if not adapter_id:
            return in_model
        times = [self._trained_unix_s.get(name) for name in ("", adapter_id)]
        return max((time for time in times if time is not None), default=None)

    def is_isolated(self, job_id: str) -> bool:
        """Whether this job trains an isolated adapter."""
        return job_id in self._expected and self._expected[job_id].isolated

    # ------------------------------------------------------------- the end

    def unwanted(self, adapter_id: str, tasks: Iterable[Task]) -> list[str]:
        """Nobody may use it from now on; returns the tasks that do."""
        newest = self._attempts.get(adapter_id, 0)
        self._unwanted[adapter_id] = max(newest, self._unwanted.pop(adapter_id, 0))
        if adapter_id in self._expected:
            self._leaving.add(adapter_id)
        while len(self._unwanted) > _MAX_UNWANTED:
            self._unwanted.popitem(last=False)
        return [task.task_id for task in tasks if adapter_of(task) == adapter_id]

    def not_made(self, adapter_id: str, tasks: Iterable[Task]) -> None:
        """What was to make it failed or was cancelled: unless another task will, it goes from the stages that have it,
        and makes room."""
        if adapter_id not in self._expected or adapter_id in self._held:
            return
        if all(adapter_of(task) != adapter_id for task in tasks):
            self._leaving.add(adapter_id)

    def take_unused(
        self, tasks: Iterable[Task], in_use: Collection[str], is_trained: Callable[[str], bool]
    ) -> list[str]:
        """Leaving adapters that no task, no weight operation (`in_use`) and no pending step uses; the caller frees them
        now."""
        if not self._leaving:
            return []
        used = {adapter_of(task) for task in tasks}.union(in_use)
        free = [adapter_id for adapter_id in sorted(self._leaving) if adapter_id not in used]
        free = [adapter_id for adapter_id in free if not is_trained(adapter_id)]
        for adapter_id in free:
            self._leaving.discard(adapter_id)
            self._trained_unix_s.pop(adapter_id, None)
            self._attempts.pop(adapter_id, None)
            del self._expected[adapter_id]
            self._held.pop(adapter_id, None)
        if free:
            self.on_change()
        return free


def adapter_of(task: Task) -> str:
    """Id of the adapter a task runs with or trains; empty: none of its own."""
    if isinstance(task, MicrobatchTask):
        return "" if task.adapter is None else task.adapter.adapter_id
    return task.adapter_id
