"""The messages of a pipeline, gone through without processes: what every rank sends and receives, in its order.

A rank is its list of events: computations, and batches of messages that it hands to its communicator, one after
another, and goes on. A communicator works on one batch at a time, as NCCL's stream does, and a message passes when both
ends have come to it: nothing is buffered, so ranks that wait for each other here could do so on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benthic.errors import NumericsError

Direction = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Message:
    """States of a micro-batch that pass from stage `border` to the next one, or their gradients back."""

    direction: Direction
    border: int
    micro_batch: int

    def __str__(self) -> str:
        here, there = (self.border, self.border + 1)[:: 1 if self.direction == "forward" else -1]
        what = "states" if self.direction == "forward" else "gradients"
        return f"{what} of micro-batch {self.micro_batch} from stage {here} to {there}"


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages that start together; order among them does not matter."""

    sent: frozenset[Message] = frozenset()
    received: frozenset[Message] = frozenset()


@dataclass(frozen=True, slots=True)
class Computation:
    """A stage's work on a micro-batch."""

    direction: Direction
    stage: int
    micro_batch: int


Events = list[Batch | Computation]


def events_of(schedule: Any, name: str, owners: Mapping[int, int]) -> dict[int, Events]:
    """What each pipeline rank does in an update under a schedule object of torch's; `owners` says whose a stage is."""
    if hasattr(schedule, "pipeline_order_with_comms"):
        return {rank: _from_actions(actions) for rank, actions in schedule.pipeline_order_with_comms.items()}
    count = schedule._n_microbatches
    return {rank: _alone(name, stage, len(owners), count) for stage, rank in owners.items()}


def _from_actions(actions: Sequence[Any]) -> Events:
    """torch's list for a rank with several stages. Gradients of weights, and FSDP's gathering, send nothing here."""
    events: Events = []
    for action in actions:
        for one in action.sub_actions or (action,):
            kind, stage, index = one.computation_type.name, one.stage_index, one.microbatch_index
            match kind:
                case "FORWARD":
                    events.append(Computation("forward", stage, index))
                case "FULL_BACKWARD" | "BACKWARD_INPUT":
                    events.append(Computation("backward", stage, index))
                case "SEND_F":
                    events.append(Batch(sent=frozenset({Message("forward", stage, index)})))
                case "RECV_F":
                    events.append(Batch(received=frozenset({Message("forward", stage - 1, index)})))
                case "SEND_B":
                    events.append(Batch(sent=frozenset({Message("backward", stage - 1, index)})))
                case "RECV_B":
                    events.append(Batch(received=frozenset({Message("backward", stage, index)})))
    return events


def _alone(name: str, stage: int, stages: int, count: int) -> Events:
    """A rank with one stage, for which torch keeps no list: 1F1B and GPipe, as their `_step_microbatches` go. 1F1B
    hands over what follows a pass and what the next needs together where their directions differ."""
    ahead = count if name == "gpipe" else min(count, stages - stage)
    order = [Computation("forward", stage, index) for index in range(ahead)]
    for index in range(count):
        order.append(Computation("backward", stage, index))
        if ahead + index < count:
            order.append(Computation("forward", stage, ahead + index))
    events: Events = []
    waiting: Batch | None = None
    for before, here in zip([None, *order], order, strict=False):
        needed = _needed(here, stages)
        if waiting is not None and before is not None and before.direction != here.direction and name == "1f1b":
            events.append(Batch(waiting.sent, needed.received))
        else:
            events += [one for one in (waiting, needed) if one is not None]
        events.append(here)
        waiting = _following(here, stages)
    events += [waiting] if waiting is not None else []
    return [event for event in events if isinstance(event, Computation) or event.sent or event.received]


def _needed(work: Computation, stages: int) -> Batch:
    border = work.stage - 1 if work.direction == "forward" else work.stage
    there = 0 <= border < stages - 1
    return Batch(received=frozenset({Message(work.direction, border, work.micro_batch)} if there else ()))


def _following(work: Computation, stages: int) -> Batch:
    border = work.stage if work.direction == "forward" else work.stage - 1
    there = 0 <= border < stages - 1
    return Batch(sent=frozenset({Message(work.direction, border, work.micro_batch)} if there else ()))


def messages_sent(events: Events) -> int:
    """How many messages a rank sends."""
    return sum(len(one.sent) for one in events if isinstance(one, Batch))


def require_matching(programs: Mapping[int, Events], owners: Mapping[int, int], micro_batches: int) -> None:
    """Raise NumericsError unless every message over a border between ranks is sent once, by the rank that has it, and
    received once, by the rank that needs it, and every stage works on every micro-batch in both directions."""
    for direction in ("forward", "backward"):
        for stage, rank in owners.items():
            found = [one for one in programs[rank] if isinstance(one, Computation)]
            done = [one.micro_batch for one in found if (one.direction, one.stage) == (direction, stage)]
            if sorted(done) != list(range(micro_batches)):
                raise NumericsError(
                    f"pipeline rank {rank}: {direction} of stage {stage} takes {len(done)} micro-batches, not each of "
                    f"the {micro_batches} once"
                )
    expected: dict[str, dict[int, list[Message]]] = {"sends": {}, "receives": {}}
    for border in range(len(owners) - 1):
        ends = owners[border], owners[border + 1]
        for index in range(micro_batches) if ends[0] != ends[1] else ():
            for direction, (source, target) in (("forward", ends), ("backward", ends[::-1])):
                message = Message(direction, border, index)
                expected["sends"].setdefault(source, []).append(message)
                expected["receives"].setdefault(target, []).append(message)
    for rank, events in programs.items():
        batches = [one for one in events if isinstance(one, Batch)]
        found = {
            "sends": [message for batch in batches for message in batch.sent],
            "receives": [message for batch in batches for message in batch.received],
        }
        for what, messages in found.items():
            here, wanted = Counter(messages), Counter(expected[what].get(rank, []))
            for message in here | wanted:
                if here[message] != wanted[message]:
                    raise NumericsError(
                        f"pipeline rank {rank} {what} the {message} {here[message]} times, not {wanted[message]}"
                    )


class _Rank:
    """A rank on its way through its events, and the batches its communicator has yet to pass on."""

    def __init__(self, events: Events) -> None:
        self.events, self.place = events, 0
        self.queue: list[tuple[set[Message], set[Message]]] = []
        self.had: set[Message] = set()
        self.done: set[Computation] = set()

    def go_on(self, stages: int) -> bool:
        """Everything that can be done without other ranks; whether anything was."""
        begun = self.place
        while self.place < len(self.events):
            event = self.events[self.place]
            if isinstance(event, Batch):
                self.queue.append((set(event.sent), set(event.received)))
            elif self._ready(event, stages):
                self.done.add(event)
            else:
                break
            self.place += 1
        return self.place > begun

    def _ready(self, work: Computation, stages: int) -> bool:
        forward = work.direction == "forward"
        if not forward and Computation("forward", work.stage, work.micro_batch) not in self.done:
            return False
        if work.stage == (0 if forward else stages - 1):
            return True
        border = work.stage - 1 if forward else work.stage
        neighbour = work.stage - 1 if forward else work.stage + 1
        before = Computation(work.direction, neighbour, work.micro_batch)
        return before in self.done or Message(work.direction, border, work.micro_batch) in self.had

    def waits_for(self) -> str:
        """In words."""
        if self.queue:
            sent, received = self.queue[0]
            return "; ".join([f"to send {one}" for one in sent] + [f"to receive {one}" for one in received])
        if self.place < len(self.events):
            return f"before {self.events[self.place]}"
        return "for nothing"


def require_progress(programs: Mapping[int, Events], stages: int) -> None:
    """Raise NumericsError, with who waits for what, unless all ranks come to the end of their events."""
    ranks = {rank: _Rank(events) for rank, events in programs.items()}
    moved = True
    while moved:
        moved = False
        for one in ranks.values():
            moved |= one.go_on(stages)
        offered = {message: one for one in ranks.values() if one.queue for message in one.queue[0][0]}
        for one in ranks.values():
            for message in list(one.queue[0][1]) if one.queue else ():
                if message in offered:
                    one.queue[0][1].remove(message)
                    offered.pop(message).queue[0][0].remove(message)
                    one.had.add(message)
                    moved = True
        for one in ranks.values():
            while one.queue and not any(one.queue[0]):
                one.queue.pop(0)
    stuck = {rank: one for rank, one in ranks.items() if one.queue or one.place < len(one.events)}
    if stuck:
        told = "; ".join(f"rank {rank} waits {one.waits_for()}" for rank, one in list(stuck.items())[:4])
        raise NumericsError(f"{len(stuck)} of {len(ranks)} pipeline ranks wait for each other: {told}")
