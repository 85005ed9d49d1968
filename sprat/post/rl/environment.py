"""Episodes: the model and an environment take turns, and what the model said in all of its turns is one rollout.

A turn: the model answers; its text, with the calls of tools that are read out of it, is the action; what the
environment says is a user's turn, or results of the calls. It goes on until the environment says so, the model is cut
off, or a limit of turns or tokens is met (``finish`` is then ``length``).

Tokens are trained as they were sampled. The next prompt is the tokens so far and the tokens of what was just said
(``tokens.next_turn``): nothing is ever written anew. The environment's tokens are context: ``Rollout.trained`` leaves
them out of the loss.

An episode is a function of the weights, the problem and two seeds: its own for what the model draws in each turn, and
its group's, with which the environment begins, so that all episodes of a group begin alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from sprat.config.rl import RLRunConfig
from sprat.engine import Engine, Output, Sampling
from sprat.errors import DataError, TrainingError
from sprat.eval.tasks import problem_messages
from sprat.post.rl.environment_episode import Episode
from sprat.post.rl.environment_pool import EnvironmentPool, FaultError
from sprat.post.rl.environment_turns import TurnFormat
from sprat.post.rl.rewards import BatchReward, Verdict
from sprat.post.rl.rollout import Payer, Rollout
from sprat.tasks import Problem, Task
from sprat.tokens import Tokenizer, render

MAX_ALIVE = 128  # episodes at once, each a process
Asked = Sequence[tuple[Task, Problem]]


class EpisodePayer(Payer):
    """Samples episodes, and pays them by what the environment says; or the reward, or the problems' judge, pays.

    Args:
        reward: pays the last answer of an episode, in the place of the environment.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: RLRunConfig,
        pool: EnvironmentPool,
        reward: BatchReward | None = None,
        *,
        second: BatchReward | None = None,
    ) -> None:
        super().__init__(tokenizer, config, reward, second=second, by_reward=True)
        self._pool, self._settings, self._format = pool, config, TurnFormat(tokenizer)
        self._pays = pool.pays and reward is None

    def sample(
        self, engine: Engine, asked: Asked, settings: Sequence[Sampling], *, shaped: bool = True
    ) -> list[Rollout]:
        """See ``Payer``; ``n`` episodes of each problem.

        Raises:
            TrainingError: the environment begins otherwise with the same seed, or the last episodes were all faults.
        """
        rollouts, waiting = list[Rollout](), list[list[Episode]]()
        for (task, problem), own in zip(asked, settings, strict=True):
            if waiting and (len(waiting) + 1) * own.n > MAX_ALIVE:
                rollouts += self._play(engine, waiting, shaped)
                waiting = []
            waiting.append([Episode(task, problem, own, sample) for sample in range(own.n)])
        return rollouts + self._play(engine, waiting, shaped)

    def again(self, asked: Asked, rollouts: Sequence[Rollout]) -> tuple[list[Verdict], list[Verdict]] | None:
        """What episodes were paid, and what they are when they are played again with the same actions.

        Where a reward pays they are played again too, to see that the environment says the same.

        Raises:
            TrainingError: the environment answers the same actions otherwise.
        """
        paid = [place for place, rollout in enumerate(rollouts) if rollout.reward is not None]
        rewards = self._pool.map(lambda place: self._replay(asked[place], rollouts[place]), paid)
        if not self._pays:
            return super().again(asked, rollouts)
        return [Verdict(rollouts[place].reward) for place in paid], [Verdict(reward) for reward in rewards]

    def _play(self, engine: Engine, groups: Sequence[Sequence[Episode]], shaped: bool) -> list[Rollout]:
        """All episodes of ``groups`` to their ends, turn by turn."""
        episodes = [episode for group in groups for episode in group]
        try:
            self._pool.map(self._begin, episodes)
            for group in groups:
                self._share_prompt(group)
            for episode in episodes:
                if not episode.is_over and self._room(engine, episode) < 1:
                    episode.fail(FaultError("raised", "asked a question that leaves no room for an answer"))
            while live := [episode for episode in episodes if not episode.is_over]:
                most = self._settings.max_tokens
                settings = [each.turn_sampling(min(most, self._room(engine, each))) for each in live]
                outputs = engine.generate([each.prompt_ids + each.token_ids for each in live], settings)
                for episode, output in zip(live, outputs, strict=True):
                    self._take_turn(episode, output)
                self._pool.map(self._step, live)
                for episode in live:
                    self._listen(engine, episode)
        finally:
            for episode in episodes:
                if episode.process is not None:
                    episode.process.close()
        for episode in episodes:
            self._pool.note(episode.fault)
        return self._pay_all(episodes, shaped)

    def _begin(self, episode: Episode) -> None:
        """Start the environment and read its question."""
        try:
            episode.process = self._pool.open()
            reply = episode.process.reset(episode.given, episode.seed)
            episode.tools = list(reply["tools"])
            episode.prompt_ids = self._format.prompt_ids(episode.given, reply, episode.sampling.thinking)
        except FaultError as fault:
            episode.fail(fault)
        except DataError as error:
            episode.fail(FaultError("raised", f"said what the model cannot be told: {error.what}"))

    def _share_prompt(self, group: Sequence[Episode]) -> None:
        """See that all episodes of a group begin alike; those that did not begin get the prompt of the others.

        Raises:
            TrainingError: they do not.
        """
        prompts = {tuple(episode.prompt_ids) for episode in group if episode.fault is None}
        if len(prompts) > 1:
            what = "reset begins otherwise each time, with the same problem and seed"
            raise TrainingError(what, where=self._pool.label, todo="draw by random.Random(seed) in reset")
        for episode in group:
            episode.prompt_ids = list(next(iter(prompts))) if prompts else self._plain_prompt(episode.problem)

    def _plain_prompt(self, problem: Problem) -> list[int]:
        """What the ledger has as the prompt of episodes of which none began."""
        try:
            return render(self.tokenizer, problem_messages(problem))
        except DataError:
            return [self.tokenizer.special_ids.eos]

    def _room(self, engine: Engine, episode: Episode) -> int:
        """Tokens that the rest of the episode may have."""
        context = engine.limits.context - len(episode.prompt_ids)
        return min(context, self._settings.environment.max_tokens or context) - len(episode.token_ids)

    def _take_turn(self, episode: Episode, output: Output) -> None:
        """Keep what was sampled, and read it."""
        episode.turns.append((len(episode.token_ids), len(output.token_ids)))
        episode.token_ids += output.token_ids
        episode.logprobs += output.logprobs or [0.0] * len(output.token_ids)
        episode.routes = getattr(output, "routes", None)
        is_whole = output.finish_reason == "stop"
        episode.last = self._format.read(output.token_ids, episode.tools, episode.sampling.thinking, finished=is_whole)
        episode.tool_calls += len(episode.last.calls)
        if not is_whole:
            episode.cut()

    def _step(self, episode: Episode) -> None:
        """Give the environment the turn; where the episode was cut off, ask what it was worth."""
        process, turn = episode.process, episode.last
        assert process is not None and turn is not None
        try:
            if episode.is_over:
                episode.reply = {"reward": process.reward(), "messages": [], "done": False, "errors": 0}
            else:
                episode.reply = process.step(turn.content, turn.rows(), turn.response.reasoning)
        except FaultError as fault:
            episode.fail(fault)

    def _listen(self, engine: Engine, episode: Episode) -> None:
        """Take in what the environment said: its reward, its end, or the tokens that come next."""
        reply = episode.reply
        if episode.fault is not None:
            return
        episode.tool_errors += reply["errors"]
        episode.total = (episode.total or 0.0) + (reply["reward"] or 0.0)
        if reply["done"]:
            episode.is_over = True
            episode.total = None if reply["reward"] is None else episode.total
        if episode.is_over:
            return
        assert episode.last is not None
        try:
            ids = self._format.next_ids(episode.last, reply["messages"], episode.sampling.thinking)
        except DataError as error:
            episode.fail(FaultError("raised", f"said what the model cannot be told: {error.what}"))
            return
        is_last = len(episode.turns) >= self._settings.environment.max_turns
        if is_last or self._room(engine, episode) <= len(ids):
            episode.cut()
            self._step(episode)
            self._listen(engine, episode)
            return
        episode.token_ids += ids
        episode.logprobs += [0.0] * len(ids)

    def _replay(self, asked: tuple[Task, Problem], rollout: Rollout) -> float | None:
        """What the environment pays the same actions once more; None for a fault.

        Raises:
            TrainingError: it says something else.
        """
        episode = Episode(*asked, Sampling(seed=rollout.environment_seed), 0)
        episode.process = self._pool.open()
        try:
            episode.tools = list(episode.process.reset(episode.given, episode.seed)["tools"])
            end = 0
            for first, count in rollout.trained or ():
                if first:
                    self._compare(episode, rollout.token_ids[end:first])
                end = first + count
                ids = rollout.token_ids[first:end]
                episode.last = self._format.read(ids, episode.tools, None, finished=True)
                if ids[-1] in self.tokenizer.eos_token_ids:
                    self._step_again(episode)
            if rollout.finish == "length":
                episode.is_over = True
                self._step_again(episode)
            return episode.total
        except FaultError:
            return None
        finally:
            episode.process.close()

    def _step_again(self, episode: Episode) -> None:
        """A turn of an episode that is played again. Raises: FaultError."""
        self._step(episode)
        if episode.fault is not None:
            raise episode.fault
        episode.total = (episode.total or 0.0) + (episode.reply["reward"] or 0.0)

    def _compare(self, episode: Episode, said: Sequence[int]) -> None:
        """Raises: TrainingError: the environment says something else than it ``said``."""
        assert episode.last is not None
        if episode.reply["done"] or self._format.next_ids(episode.last, episode.reply["messages"], None) != list(said):
            what = "the same actions were answered otherwise when an episode was played again"
            todo = "let it be a function of problem, seed and actions (random.Random(seed), no clock, no network)"
            raise TrainingError(what, where=self._pool.label, todo=todo)

    def _pay_all(self, episodes: Sequence[Episode], shaped: bool) -> list[Rollout]:
        """The rollouts of episodes that are over."""
        responses = [episode.response for episode in episodes]
        sound = [place for place, episode in enumerate(episodes) if episode.fault is None]
        asked = [(episodes[place].task, episodes[place].problem) for place in sound]
        judged = [Verdict(t, "abstained" if t is None else "paid") for t in (episodes[p].total for p in sound)]
        if not self._pays:
            judged = self.judge(asked, [responses[place] for place in sound])
        seconds: list[float | None] = [None] * len(sound)
        if self.second is not None:
            pairs = [(episodes[place].problem, responses[place]) for place in sound]
            seconds = [verdict.reward for verdict in self.second.pay(pairs)]
        said = dict(zip(sound, zip(judged, seconds, strict=True), strict=True))
        rollouts = []
        for place, (episode, response) in enumerate(zip(episodes, responses, strict=True)):
            verdict, second = said.get(place) or (episode.fault_verdict(), None)
            reward = verdict.reward
            if shaped:
                longest = max((count for _, count in episode.turns), default=0)
                reward = self.shaped(reward, (episode.problem, response), (longest, episode.finish == "length"))
            rollouts.append(episode.rollout(self.tokenizer, response, verdict, reward, second))
        return rollouts
