"""How the blocks of a cluster wait for each other: every order of events is tried.

A model of hardware that is not there: warpgroups, mbarriers with arrivals, bytes and
parities, and copies that are made at any time after they were sent. It takes who sends
what to whom, slots and parities from the kernels' own functions. In every order, what
is read must be what was meant, and nothing be written that is being read or has still
to be sent.
"""

from collections import Counter
from typing import Any, NamedTuple

import pytest
from flax_lstm_kernels.gpu import cluster_exchange
from flax_lstm_kernels.gpu.cluster_exchange import (
    others,
    owners,
    parity_of,
    slot_of,
)

pytestmark = pytest.mark.kernels


class Read(NamedTuple):
    """Reads places, each of which is to hold what a round put there; takes a while."""

    wanted: dict[Any, int]


class Write(NamedTuple):
    """Writes places on behalf of a round."""

    places: tuple[Any, ...]
    round_: int


class Publish(NamedTuple):
    """Arms a barrier for so many tiles and sends copies `(source, target, barrier)`."""

    barrier: Any
    tiles: int
    copies: tuple[Any, ...]


class Wait(NamedTuple):
    """Waits for the phase of a parity to end."""

    barrier: Any
    parity: int


class Meet(NamedTuple):
    """Waits until all warpgroups of the block are here."""


class State(NamedTuple):
    """One moment.

    Attributes:
      at: For each warpgroup the operation it is at, twice that, plus 1 inside a read.
      held: The round that each place holds, by number.
      barriers: Phase, arrivals still to come and tiles still to come of each.
      flying: Copies that are under way.
    """

    at: tuple[int, ...]
    held: tuple[int, ...]
    barriers: tuple[tuple[int, int, int], ...]
    flying: frozenset[Any]


def explore(programs: dict[tuple[int, int], list[Any]], groups: int) -> int:
    """Tries all orders of programs of (member, warpgroup); returns how many moments.

    Raises:
      AssertionError: If in some order something goes wrong.
    """
    seats, texts = list(programs), list(programs.values())
    operations = [op for text in texts for op in text]
    read = {p for op in operations if isinstance(op, Read) for p in op.wanted}
    written = {p for op in operations if isinstance(op, Write) for p in op.places}
    copies = [c for op in operations if isinstance(op, Publish) for c in op.copies]
    places = sorted(read | written | {c[1] for c in copies})
    number = {place: n for n, place in enumerate(places)}
    names = sorted({op.barrier for op in operations if isinstance(op, Publish)})
    barrier_number = {name: n for n, name in enumerate(names)}

    def reading(state: State) -> set[Any]:
        return {
            place
            for text, at in zip(texts, state.at, strict=True)
            if at % 2
            for place in text[at // 2].wanted
        }

    def put(state: State, place: Any, round_: int) -> State:
        assert place not in reading(state), f"{place} is overwritten while it is read"
        sent = {copy[0] for copy in state.flying}
        assert place not in sent, f"{place} is overwritten before it is sent"
        held = list(state.held)
        held[number[place]] = round_
        return state._replace(held=tuple(held))

    def count(state: State, name: Any, arrivals: int, tiles: int) -> State:
        barriers = list(state.barriers)
        phase, coming, missing = barriers[barrier_number[name]]
        coming, missing = coming - arrivals, missing + tiles
        if coming == 0 and missing == 0:
            phase, coming = phase + 1, groups
        barriers[barrier_number[name]] = phase, coming, missing
        return state._replace(barriers=tuple(barriers))

    def moved(state: State, who: int, by: int) -> State:
        at = list(state.at)
        at[who] += by
        return state._replace(at=tuple(at))

    def after(state: State, who: int) -> State | None:
        """Returns what follows when a warpgroup goes on; None if it has to wait."""
        text, at = texts[who], state.at[who]
        if at // 2 == len(text):
            return None
        operation = text[at // 2]
        match operation:
            case Read(wanted):
                if at % 2:
                    return moved(state, who, 1)
                for place, round_ in wanted.items():
                    holds = state.held[number[place]]
                    assert holds == round_, f"{place} holds {holds}, not {round_}"
                return moved(state, who, 1)
            case Write(places, round_):
                for place in places:
                    state = put(state, place, round_)
            case Publish(barrier, tiles, sent):
                state = count(state, barrier, 1, tiles)
                state = state._replace(flying=state.flying | set(sent))
            case Wait(barrier, parity):
                if state.barriers[barrier_number[barrier]][0] % 2 == parity:
                    return None
            case Meet():
                mates = [n for n, seat in enumerate(seats) if seat[0] == seats[who][0]]
                if any(state.at[mate] != at for mate in mates):
                    return None
                for mate in mates:
                    state = moved(state, mate, 2)
                return state
        return moved(state, who, 2)

    def landed(state: State, copy: Any) -> State:
        source, target, barrier = copy[:3]
        state = state._replace(flying=state.flying - {copy})
        state = put(state, target, state.held[number[source]])
        return count(state, barrier, 0, -1)

    start = State(
        (0,) * len(texts),
        (0,) * len(places),
        ((0, groups, 0),) * len(names),
        frozenset(),
    )
    seen, waiting = {start}, [start]
    while waiting:
        state = waiting.pop()
        following = [after(state, who) for who in range(len(texts))]
        following += [landed(state, copy) for copy in state.flying]
        following = [new for new in following if new is not None]
        if not following:
            ended = all(
                at == 2 * len(text) for at, text in zip(state.at, texts, strict=True)
            )
            assert ended, "all wait for each other"
        for new in following:
            if new not in seen:
                seen.add(new)
                waiting.append(new)
    return len(seen)


def forward(members: int, groups: int, rounds: int) -> dict[tuple[int, int], list[Any]]:
    """Returns what `cluster` does: all of h is read, its own part sent on."""

    def h(member: Any, round_: int, owner: int) -> tuple[Any, ...]:
        return "h", int(member), int(slot_of(round_)), owner

    def program(member: int, own: int) -> list[Any]:
        made: list[Any] = []
        for k in range(rounds):
            copies = tuple(
                (h(member, k + 1, own), h(other, k + 1, own), barrier(other, k), k)
                for other in others(member, members)
            )
            made += [
                Read({h(member, k, owner): k for owner in range(members * groups)}),
                Write((h(member, k + 1, own),), k + 1),
                Publish(barrier(member, k), len(copies), copies),
                Wait(barrier(member, k), int(parity_of(k))),
            ]
        return made

    seats = [(member, group) for member in range(members) for group in range(groups)]
    return {seat: program(seat[0], own) for own, seat in enumerate(seats)}


def backward(
    members: int, groups: int, rounds: int
) -> dict[tuple[int, int], list[Any]]:
    """Returns what `cluster_backward` does: products are sent to those they are for."""

    def program(member: int, group: int) -> list[Any]:
        made: list[Any] = []
        for k in range(rounds):
            slot = int(slot_of(k))
            sent = []
            for product in range(group, members * groups // 2, groups):
                for half, (to, part) in enumerate(owners(product, groups)):
                    source = "outbox", member, slot, product, half
                    target = "inbox", int(to), slot, int(part), member
                    sent.append((source, target, barrier(to, k), k))
            got = {("inbox", member, slot, group, m): k + 1 for m in range(members)}
            made += [
                Write((("d_z", member, group),), k + 1),
                Meet(),
                Read({("d_z", member, mate): k + 1 for mate in range(groups)}),
                Write(tuple(copy[0] for copy in sent), k + 1),
                Publish(barrier(member, k), members, tuple(sent)),
                Wait(barrier(member, k), int(parity_of(k))),
                Read(got),
            ]
        return made

    return {
        (member, group): program(member, group)
        for member in range(members)
        for group in range(groups)
    }


def barrier(member: Any, round_: int) -> tuple[int, int]:
    return int(member), int(slot_of(round_))


CASES = [
    (forward, 2, 1, 6),
    (forward, 3, 1, 4),
    (forward, 2, 2, 4),
    (backward, 2, 1, 6),
    (backward, 2, 2, 3),
]


@pytest.mark.parametrize(("protocol", "members", "groups", "rounds"), CASES)
def test_in_every_order_all_get_what_they_wait_for(protocol, members, groups, rounds):
    moments = explore(protocol(members, groups, rounds), groups)
    assert moments > rounds * members * groups


def without(kind: type, programs: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    """Leaves out the operations of a kind."""
    return {
        seat: [op for op in text if not isinstance(op, kind)]
        for seat, text in programs.items()
    }


def rewaited(programs: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    """Waits for the other parity."""
    return {
        seat: [
            op._replace(parity=1 - op.parity) if isinstance(op, Wait) else op
            for op in text
        ]
        for seat, text in programs.items()
    }


def overarmed(programs: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    """Announces a tile too many."""
    return {
        seat: [
            op._replace(tiles=op.tiles + 1) if isinstance(op, Publish) else op
            for op in text
        ]
        for seat, text in programs.items()
    }


def unmet(programs: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    return without(Meet, programs)


def unwaited(programs: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    return without(Wait, programs)


@pytest.mark.parametrize(
    ("protocol", "groups", "broken", "message"),
    [
        (forward, 1, unwaited, "overwritten before it is sent|holds"),
        (forward, 1, rewaited, "holds"),
        (forward, 1, overarmed, "all wait for each other"),
        (backward, 1, unwaited, "holds"),
        (backward, 2, unmet, "holds|while it is read"),
    ],
)
def test_the_model_finds_what_is_wrong(protocol, groups, broken, message):
    with pytest.raises(AssertionError, match=message):
        explore(broken(protocol(2, groups, 4)), groups)


@pytest.mark.parametrize("protocol", [forward, backward])
def test_one_slot_would_not_do(protocol, monkeypatch):
    monkeypatch.setattr(cluster_exchange, "SLOTS", 1)
    with pytest.raises(AssertionError, match=r"overwritten|holds"):
        explore(protocol(2, 1, 3), 1)


def test_every_block_gets_as_many_bytes_as_its_warpgroups_announce():
    """The number that interpreted barriers wait for, too: see `Team.barriers`."""
    for members, groups in ((2, 1), (4, 1), (2, 2), (4, 2), (6, 1), (8, 2), (16, 1)):
        for protocol in (forward, backward):
            announced, coming = Counter(), Counter()
            for text in protocol(members, groups, 1).values():
                for op in text:
                    if isinstance(op, Publish):
                        announced[op.barrier] += op.tiles
                        coming.update(copy[2] for copy in op.copies)
            assert announced == coming
            assert len(announced) == members
