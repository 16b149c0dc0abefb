"""Several tasks as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from perilune.data.mixture import apportion
from perilune.errors import DataError
from perilune.seeding import derive_seed
from perilune.tasks.base import Problem, Reward, Split, Style, Task, Trace
from perilune.tasks.config import TaskConfig
from perilune.tasks.reasoning_gym import SMALL_PARAMS, ReasoningGymTask

TASKS: dict[str, Callable[[TaskConfig], Task]] = dict.fromkeys(sorted(SMALL_PARAMS), ReasoningGymTask)
"""Tasks that have a compact prompt, a scripted teacher and small default difficulties, by name.

Any other data set of reasoning-gym also works by its name, with its own question as prompt and without a teacher.
"""


class TaskMixture:
    """Tasks with weights behind the interface of one task; problems go back to the task that made them."""

    def __init__(self, configs: Sequence[TaskConfig]) -> None:
        """Build the tasks.

        Raises:
            DataError: there is no task, a name occurs twice, or a task cannot be built.
        """
        names = [config.name for config in configs]
        if not names:
            raise DataError("a task mixture needs at least one task, got none")
        if len(set(names)) != len(names):
            raise DataError(f"a task mixture names each task once, got {', '.join(names)}")
        self.configs = tuple(configs)
        self._tasks = {config.name: build_task(config) for config in configs}

    def sample(self, split: Split, count: int, seed: int, *, allow_fewer: bool = False) -> list[Problem]:
        """Return `count` different problems of a split, shared out by the weights, in a shuffled order.

        With `allow_fewer` a task that has fewer different questions than its share gives those it has.

        Raises:
            DataError: a task has too few different questions.
        """
        counts = apportion([config.weight for config in self.configs], count)
        problems = [
            problem
            for (name, task), share in zip(self._tasks.items(), counts, strict=True)
            for problem in task.sample(split, share, derive_seed(seed, "mixture", name), allow_fewer=allow_fewer)
        ]
        Random(derive_seed(seed, "mixture", "order")).shuffle(problems)
        return problems

    def exercises(self, count: int, seed: int, style: Style | None = None) -> list[tuple[Problem, Trace]]:
        """Return `count` training problems with worked answers, shared out by the weights, in a shuffled order.

        A task with fewer different questions than its share gives them again, each time with another trace.

        Raises:
            DataError: a task has no scripted teacher.
        """
        counts = apportion([config.weight for config in self.configs], count)
        pairs: list[tuple[Problem, Trace]] = []
        for (name, task), share in zip(self._tasks.items(), counts, strict=True):
            own_seed = derive_seed(seed, "exercises", name)
            problems = task.sample("train", share, own_seed, allow_fewer=True)
            for number in range(share):
                problem = problems[number % len(problems)]
                pairs.append((problem, task.teach(problem, derive_seed(own_seed, "trace", number), style)))
        Random(derive_seed(seed, "exercises", "order")).shuffle(pairs)
        return pairs

    def verify(self, problem: Problem, response: str) -> Reward:
        """Judge a response by the problem's own task."""
        return self._task_of(problem).verify(problem, response)

    def teach(self, problem: Problem, seed: int, style: Style | None = None) -> Trace:
        """Return a worked answer by the problem's own task.

        Raises:
            DataError: the task has no scripted teacher.
        """
        return self._task_of(problem).teach(problem, seed, style)

    def _task_of(self, problem: Problem) -> Task:
        if problem.task not in self._tasks:
            raise DataError(f"problem {problem.id} is of task {problem.task!r}; this mixture has {list(self._tasks)}")
        return self._tasks[problem.task]


def build_task(config: TaskConfig) -> Task:
    """Build a task by its name.

    Raises:
        DataError: no such task, or it cannot be built.
    """
    return TASKS.get(config.name, ReasoningGymTask)(config)
