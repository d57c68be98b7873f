"""Several players at one table: games, debates, other talk between policies; every player has an episode of its own.

A game says whose turn it is and what each player sees. A seat at the table is an ordinary environment: its `step` hands
the policy's turn to the game and waits until it is this player's turn again. So each player's tokens are its own list,
masked and rewarded like any episode's, and the same policy may play all seats, or another sampler some of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from posttrain.core import Message, Record, RolloutError, SampleTokens, Sampling, StepResult, Task, UsageError, user
from posttrain.rollout.environment import EpisodeLimits
from posttrain.rollout.episode import Episode, EpisodeSettings
from posttrain.rollout.episodes import play_together
from posttrain.rollout.group import Group
from posttrain.rollout.lockstep import Lockstep, Parked
from posttrain.rollout.turn_tokens import TurnTokens


class Moved(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a player's turn leads to."""

    next: str = ""  # whose turn it is; "" where the game is over
    seen: dict[str, str] = {}  # by player, what they are told before their next turn
    rewards: dict[str, float] = {}  # by player


class Game(Protocol):
    """The rules. One object for each game that is played."""

    @property
    def players(self) -> Sequence[str]:
        """Their names; the first one begins."""
        ...

    async def begin(self, task: Task) -> Mapping[str, str]:
        """By player, what they read first."""
        ...

    async def move(self, player: str, turn: Message) -> Moved:
        """What the player whose turn it is has said."""
        ...


class Table:
    """One game being played."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self.players = tuple(game.players)
        self._turn = self.players[0]
        self._changed = asyncio.Condition()
        self._begun: asyncio.Future[Mapping[str, str]] | None = None
        self._untold = dict.fromkeys(self.players, "")
        self._owed = dict.fromkeys(self.players, 0.0)
        self._waiting: dict[str, Parked] = {}
        self._abandoned = False

    @property
    def over(self) -> bool:
        """Whether nobody moves any more."""
        return not self._turn

    async def opening(self, player: str, task: Task) -> str:
        """What a player reads before their first turn, once it is their turn."""
        if self._begun is None:
            self._begun = asyncio.ensure_future(_begin(self.game, task))
        rules = (await asyncio.shield(self._begun)).get(player, "")
        return "\n".join(part for part in (rules, await self._wait(player)) if part)

    async def move(self, player: str, turn: Message) -> StepResult:
        """Make a move; wait for the player's next turn, or the end."""
        moved = await self.game.move(player, turn)
        for name, text in moved.seen.items():
            self._untold[name] = "\n".join(part for part in (self._untold[name], text) if part)
        for name, reward in moved.rewards.items():
            self._owed[name] += reward
        await self._pass_to(moved.next)
        told = await self._wait(player)
        reward, self._owed[player] = self._owed[player], 0.0
        info = {"abandoned": 1} if self._abandoned else {}
        return StepResult(messages=(user(told or "Your turn."),), reward=reward, done=self.over, info=info)

    async def leave(self) -> None:
        """A player's episode is over. If the game is not, it was cut off or has failed, and ends for all."""
        if not self.over:
            self._abandoned = True
            await self._pass_to("")

    async def _pass_to(self, player: str) -> None:
        if player and player not in self.players:
            raise UsageError(f"the game gives the turn to {player!r}, who does not play; players: {self.players}")
        async with self._changed:
            self._turn = player
            for name, place in self._waiting.items():
                if self.over or name == player:
                    place.resume()
            self._changed.notify_all()

    async def _wait(self, player: str) -> str:
        if not self.over and self._turn != player:
            with Parked() as place:
                self._waiting[player] = place
                try:
                    async with self._changed:
                        await self._changed.wait_for(lambda: self.over or self._turn == player)
                finally:
                    del self._waiting[player]
        told, self._untold[player] = self._untold[player], ""
        return told


async def _begin(game: Game, task: Task) -> Mapping[str, str]:
    return await game.begin(task)


class Seat:
    """One player's place at a table. An `Environment`.

    Raises:
        RolloutError: from `reset`, where the game ended before this player's first turn.
    """

    def __init__(self, table: Table, player: str) -> None:
        self.table, self.player = table, player

    async def reset(self, task: Task) -> Sequence[Message]:
        """Wait for the first turn."""
        opening = await self.table.opening(self.player, task)
        if self.table.over:
            raise RolloutError(f"the game ended before the first turn of {self.player}")
        return (user(opening),)

    async def step(self, action: Message) -> StepResult:
        """Make a move."""
        return await self.table.move(self.player, action)

    async def close(self) -> None:
        """Leave the table."""
        await self.table.leave()


async def run_self_play(
    samplers: SampleTokens | Mapping[str, SampleTokens],
    tasks: Sequence[Task],
    game: type[Game] | object,
    sampling: Sampling,
    *,
    turns: TurnTokens,
    seed: int,
    step: int = 0,
    limits: EpisodeLimits | None = None,
    lockstep: bool = False,
) -> dict[str, list[Group]]:
    """Play `sampling.n` games of each task.

    Args:
        samplers: one for all players, or one for each by name: the policy against itself, or against earlier ones.
        tasks: what the games are about; their ids differ.
        game: makes the rules of one game: a class, or a function without arguments.
        sampling: how to sample: `max_tokens` for each turn, `n` games of each task; its `seed` is replaced.
        turns: the chat template.
        seed: the run's seed.
        step: the training step.
        limits: of each player's episode.
        lockstep: give the sampler the turns of all games together; only where all players have the same one.

    Returns:
        By player, a group for each task, in order: the same player's episodes in the n games. The players' episodes of
        one game have the same index. Where one player's episode is cut off or fails, the others' end with
        `metrics["abandoned"]`; a player whose turn never came has a failed episode.

    Raises:
        UsageError: `lockstep` with several samplers, or no sampler for a player.
    """
    if not callable(game):
        raise UsageError("self-play: game is a class, or a function, that makes the rules of one game")
    single = None if isinstance(samplers, Mapping) else samplers
    if lockstep and single is None:
        raise UsageError("self-play: in lockstep all players have the same sampler")
    if lockstep and single is not None and not isinstance(single, Lockstep):
        single = Lockstep(single)
    tables: list[Table] = []
    episodes: list[tuple[str, Task, Episode]] = []
    for task in tasks:
        for index in range(sampling.n):
            table = Table(game())
            tables.append(table)
            for player in table.players:
                sampler = single or (samplers.get(player) if isinstance(samplers, Mapping) else None)
                if sampler is None:
                    raise UsageError(f"self-play: no sampler for the player {player!r}")
                settings = EpisodeSettings(
                    sampler=sampler,
                    factory=lambda table=table, player=player: Seat(table, player),  # type: ignore[misc]
                    turns=turns,
                    sampling=sampling.replace(n=1),
                    limits=limits or EpisodeLimits(),
                    seed=seed,
                    step=step,
                )
                own = task.replace(id=f"{task.id}#{player}")
                episodes.append((player, own, Episode(settings, own, index)))
    await play_together([episode for _, _, episode in episodes], single)
    groups: dict[str, list[Group]] = {player: [] for table in tables[:1] for player in table.players}
    for player, found in groups.items():
        for task in tasks:
            mine = [(own, one) for name, own, one in episodes if name == player and own.id == f"{task.id}#{player}"]
            siblings = tuple(episode.trajectory() for _, episode in mine)
            found.append(Group(task=mine[0][0], trajectories=siblings))
    return groups
