"""The tasks of lm-eval (EleutherAI's evaluation harness), through the optional extra ``[eval]``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from .._files import local
from ..errors import ConfigError, DataError, MissingExtraError


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    task_dir: str | os.PathLike[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Run lm-eval ``tasks`` (such as "gsm8k") on ``model``: task → metric → value.

    Tasks download their data sets unless those are cached.  ``limit``: the first so many examples.
    ``task_dir``: a directory with YAML files of more tasks.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ConfigError: lm-eval has no task of that name.
        DataError: the data set of a task cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("evaluation on lm-eval tasks", "lm-eval", "eval") from error

    manager = TaskManager(include_path=None if task_dir is None else str(local(task_dir)))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(f"tasks={unknown[0]!r}: lm-eval has no such task (see: lm-eval ls tasks)")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager
        )
    except OSError as error:  # no connection, or no such data set
        raise DataError(f"cannot load the data of {', '.join(tasks)}: {error}") from error
    results: dict[str, dict[str, Any]] = found["results"]
    return {
        task: {
            name.removesuffix(",none"): float(value)  # "metric,filter"
            for name, value in metrics.items()
            if "," in name and isinstance(value, int | float)
        }
        for task, metrics in results.items()
    }
