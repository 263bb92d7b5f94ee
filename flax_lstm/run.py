"""A run: trains into a folder, and answers from the folder alone.

A run's folder holds `config.json` (the effective configuration), `tokenizer.json`,
`metrics.jsonl` (one line for each epoch), `environment.json`, `summary.json` (the data
and the result) and `checkpoints/`. It can be moved and copied: `Run.load` and `predict`
need nothing else, `evaluate` reads the data again from where it was.

>>> from flax_lstm import run
>>> from flax_lstm.config import Config
>>> result = run.train(Config())  # doctest: +SKIP
>>> result.predict(["not at all bad"])[0].label  # doctest: +SKIP
'positive'
"""

import contextlib
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from flax_lstm import data, distributed, environment
from flax_lstm import folder as files
from flax_lstm.checkpoint import Checkpoints
from flax_lstm.config import Config, UserError
from flax_lstm.environment import use_compilation_cache
from flax_lstm.epochs import Trainer, goes_on, place_of
from flax_lstm.events import EpochDone, Event, Finished, RunStarted, StepDone
from flax_lstm.history import History
from flax_lstm.host_memory import OutOfMemoryError
from flax_lstm.mesh import check_mesh, mesh_sizes, model_over_mesh
from flax_lstm.model_state import classifier, initial_state, restore, state_template
from flax_lstm.progress import Progress
from flax_lstm.settings import (
    check_checkpoint,
    check_implementation,
    check_places,
    check_same_config,
    check_same_data,
    check_settings,
    check_steps,
    memory_errors,
    recorded_config,
    refusals_of_kernels,
    with_absolute_paths,
)
from flax_lstm.startup import Startup
from flax_lstm.stopping import Stop, Stopped
from flax_lstm.train import make_optimizer, parallelize
from flax_lstm.trained import Prediction, Run

__all__ = [
    "EpochDone",
    "Event",
    "Finished",
    "OutOfMemoryError",
    "Prediction",
    "Run",
    "RunStarted",
    "StepDone",
    "Stop",
    "Stopped",
    "train",
    "use_compilation_cache",
]


def train(
    config: Config,
    folder: str | Path | None = None,
    *,
    resume: bool | Literal["auto"] = False,
    cast_dtype: bool = False,
    on_event: Callable[[Event], None] | None = None,
    stop: Stop | None = None,
    started: float | None = None,
) -> Run:
    """Trains, saves, restores what it saved, and tests it.

    Args:
      config: All settings.
      folder: The run's folder; the first unused of `runs/NAME-1`, … when None.
      resume: Goes on from the newest intact checkpoint in `folder`, exactly: the
        parameters at the end are those of a run that was never interrupted. The
        configuration must be the recorded one, but `epochs` may grow, and the same
        data lie elsewhere; a schedule is
        then stretched over the new number from where the run goes on. "auto" does so
        where the folder holds a run, and starts one elsewhere. Of a run that has
        nothing left to do the result is told, and nothing is changed but a tokenizer
        that is lost or damaged: it is made again from the data, with a warning.
      cast_dtype: With `resume`: `model.dtype` may be another, and the numbers of the
        checkpoint are converted.
      on_event: Called with each event of `flax_lstm.events`.
      stop: Makes the run save, and raise `Stopped`, at the step after it was asked.
      started: When the time to the first step starts to count, by
        `time.perf_counter`; now when None.

    Returns:
      The run, with the parameters that were tested.

    Raises:
      UserError: If the request cannot be met: bad settings or data, a folder that
        holds a run (or none, with `resume`), or one that another process writes.
      NonFiniteLossError: If a loss is not finite; earlier checkpoints stay.
      CheckpointError: If a checkpoint cannot be written or read.
      OutOfMemoryError: If there is not enough memory for these settings.
      Stopped: If `stop` was asked.
    """
    startup = Startup(time.perf_counter() if started is None else started)
    with distributed.watching():
        with distributed.together():
            environment.check_devices()
            config = with_absolute_paths(check_request(config))
            if folder is None:
                if resume:
                    raise UserError("resume needs the folder of the run to go on with.")
                name = Path(config.data.data).stem or "run"
                folder = files.unused(Path("runs"), name)
            if folder == "":  # as a path it would be the folder that one is in
                raise UserError("the folder of the run has an empty name.")
        folder = Path(distributed.from_first(str(Path(folder).resolve())))
        distributed.agree(
            configuration=config.to_dict(),
            asked={"resume": resume, "cast_dtype": cast_dtype},
            code=environment.code(),
        )
        with distributed.together():
            if resume == "auto":
                resume = files.holds_run(folder)
            if resume and not files.holds_run(folder):
                raise UserError(
                    f"nothing to resume: {folder} holds no run (no {files.CONFIG}); "
                    "start one there without --resume."
                )
        with files.writing_together(folder), memory_errors(config):
            with distributed.together():
                if resume:
                    recorded = recorded_config(folder)
                    check_same_config(
                        recorded.to_dict(), config, f"the run in {folder}", cast_dtype
                    )
                    check_places(recorded, config, folder)
                elif files.holds_run(folder):
                    raise UserError(
                        f"{folder} already holds a run; continue it with --resume, or "
                        "give another folder. Nothing was changed."
                    )
            told = on_event if distributed.is_first() else None
            return _train(
                config,
                folder,
                resume,
                cast_dtype,
                told or (lambda event: None),
                stop or Stop(),
                startup,
            )


def check_request(config: Config, *, more_to_join: bool = False) -> Config:
    """Returns a configuration that a run here may have, each setting of its type.

    Args:
      config: All settings.
      more_to_join: Other processes are still to come with their devices, of which a
        mesh may need any number.

    Raises:
      UserError: If a setting is not one that this machine can train with.
      NoDeviceError: If a mesh is asked for, and there is no device.
    """
    config = config.checked()
    check_settings(config)
    mesh = config.training.mesh
    if more_to_join:
        mesh_sizes(mesh, sys.maxsize)
    elif mesh is not None:  # else JAX need not be started for it
        environment.check_devices()
        check_mesh(mesh, jax.devices())
    return config


def _train(
    config: Config,
    folder: Path,
    resume: bool,
    cast_dtype: bool,
    on_event: Callable[[Event], None],
    stop: Stop,
    startup: Startup,
) -> Run:
    """Trains with the folder's lock held."""
    share = data.share_of_this_process()
    with startup.loading():
        corpus = data.load(config.data, config.training.seed, share=share)
    distributed.agree(data=corpus.summary)
    first = distributed.is_first()
    with Checkpoints(folder / files.CHECKPOINTS) as checkpoints:
        with distributed.together(), files.reading(folder):
            recorded = {}
            if resume and (folder / files.SUMMARY).exists():
                recorded = recorded_summary(folder)
                check_same_data(recorded["data"], corpus.summary, folder)
            resume = resume and _has_begun(folder, checkpoints)
            cast_dtype = cast_dtype or recorded.get("cast_dtype", False)
        lengths = corpus.bucket_lengths
        batches = data.batch_count(corpus.measured["train"], lengths, config.data)
        check_steps(config, batches)
        model = model_over_mesh(config.model, config.training.mesh)
        init, apply = classifier(model, corpus.tokenizer.vocabulary_size)
        optimizer = make_optimizer(config.training, batches * config.training.epochs)
        program = parallelize(apply, optimizer, config.training)
        with refusals_of_kernels():
            template = state_template(config, init)
        check_implementation(
            config, apply, template.params, max(lengths), len(program.devices)
        )
        summary = _summary(corpus, batches, template.params, cast_dtype)
        tokenizer = summary["tokenizer"]
        how = {
            "check": lambda meta: check_checkpoint(
                meta, config, tokenizer, folder, cast_dtype
            ),
            "cast_dtype": cast_dtype,
        }
        progress, history, finished = Progress(), History(), None
        if resume:
            with files.reading(folder):
                state, meta = checkpoints.restore_last(template, **how)
            progress = Progress.from_dict(meta["progress"])
            with distributed.together(), files.reading(folder):
                history = History.read(folder / files.METRICS, meta)
                if recorded_config(folder).model.dtype == config.model.dtype:
                    summary["result"] = recorded.get("result")
                    finished = _finished(folder, summary["result"], config, progress)
        else:
            state = initial_state(config, init, jax.random.key(config.training.seed))
        distributed.agree(
            checkpoint={"epoch": progress.epoch, "batch": progress.tally.steps}
        )
        # First what makes this the folder of a run: whatever ends the process from
        # here on, the same command can be given again.
        if first and finished is None:
            files.write_json(folder / files.CONFIG, config.to_dict())
        if first and not (resume and _has_tokenizer(folder, tokenizer)):
            corpus.tokenizer.save(folder / files.TOKENIZER)
        if first and finished is None:
            files.write_json(
                folder / files.ENVIRONMENT, environment.describe(program.devices)
            )
            files.write_json(folder / files.SUMMARY, summary)
        meta = {"tokenizer": tokenizer, "config": config.to_dict()}
        on_event(
            RunStarted(
                folder=folder,
                config=config,
                data=corpus.summary,
                epochs=config.training.epochs,
                batches=batches,
                parameters=summary["parameters"],
                devices=tuple(d.device_kind for d in program.devices),
                first_epoch=progress.epoch + 1,
                first_batch=progress.tally.steps + 1,
            )
        )
        if finished is not None:
            on_event(finished)
            return Run.load(folder)
        began = time.perf_counter()
        lines = (
            history.writing(folder / files.METRICS)
            if first
            else contextlib.nullcontext()
        )
        with lines, stop.deferred():
            trainer = Trainer(
                config=config,
                corpus=corpus,
                lengths=lengths,
                batches=batches,
                program=program,
                checkpoints=checkpoints,
                history=history,
                on_event=on_event,
                meta=meta,
                startup=startup,
                stop=stop,
            )
            if not resume:  # so that there is one to go on from, whatever comes
                checkpoints.save(0, state, {**meta, **place_of(progress, history)})
            placed = trainer.run(program.place_state(state), progress)
            checkpoints.wait()
        del placed
        if not distributed.several():  # those end together, or not at all
            stop.check()
        # What is tested is what is on disk.
        state, meta = restore(checkpoints, template, config, **how)
        test = trainer.evaluate(program.place_state(state), "test")
        finished = Finished(
            folder=folder,
            test=test,
            tested_epoch=meta["progress"]["epoch"],
            best_epoch=progress.best_epoch,
            epochs_done=progress.epoch,
            stopped_early=progress.epoch < config.training.epochs,
            seconds=time.perf_counter() - began,
            startup_seconds=startup.seconds,
            startup_compile_seconds=startup.compile_seconds,
            startup_import_seconds=startup.import_seconds,
            startup_data_seconds=startup.data_seconds,
            wait_share=history.wait_share(),
            skipped_steps=history.skipped(),
        )
    result = dataclasses.asdict(finished)
    del result["folder"]
    result["best_validation_accuracy"] = progress.best_accuracy
    if first:
        files.write_json(folder / files.SUMMARY, {**summary, "result": result})
    on_event(finished)
    return Run(
        folder=folder,
        config=config,
        tokenizer=corpus.tokenizer,
        label_names=corpus.label_names,
        metrics={**result, "epochs": history.records},
        lengths=lengths,
        params=state.params,
    )


def _summary(
    corpus: data.Corpus, batches: int, params: Any, cast_dtype: bool
) -> dict[str, Any]:
    """Returns what a run records of itself before it has a result."""
    return {
        "data": corpus.summary,
        "label_names": list(corpus.label_names),
        "tokenizer": corpus.tokenizer.fingerprint(),
        "batches": batches,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "cast_dtype": cast_dtype,
        "result": None,  # until there is one; a run that goes on keeps the old
    }


def _finished(
    folder: Path, result: Any, config: Config, progress: Progress
) -> Finished | None:
    """Returns the end of a run that has nothing left to do, as it is on record."""
    names = {field.name for field in dataclasses.fields(Finished)} - {"folder"}
    if not isinstance(result, dict) or not result.keys() >= names:
        return None
    # The result may be that of fewer epochs, where a run that went on was killed.
    if goes_on(config.training, progress) or result["epochs_done"] != progress.epoch:
        return None
    return Finished(folder=folder, **{name: result[name] for name in names})


class ResumeWarning(UserWarning):
    """A run is resumed from its beginning, or what it lacks is written anew."""


def _has_tokenizer(folder: Path, fingerprint: str) -> bool:
    """Says whether the tokenizer of a run that goes on is there.

    Another file in its place is kept under another name.

    Warns:
      ResumeWarning: If it is not.
    """
    path = folder / files.TOKENIZER
    with contextlib.suppress(UserError):
        if data.TextTokenizer.load(path).fingerprint() == fingerprint:
            return True
    kept = ""
    if path.exists():
        aside = path.rename(files.unused(folder, f"{path.stem}-damaged"))
        kept = f"; what was there is now {aside.name}"
    warnings.warn(
        f"{path} is lost, damaged or of another run; it is written anew from the data"
        f"{kept}.",
        ResumeWarning,
        stacklevel=2,
    )
    return False


def recorded_summary(folder: Path) -> dict[str, Any]:
    """Reads a run's summary.

    Raises:
      UserError: If it cannot be read; says that one can do without it.
    """
    try:
        return files.read_json(folder / files.SUMMARY)
    except UserError as error:
        raise UserError(
            f"{error} Restore it, or remove it: a run that goes on writes it anew."
        ) from error


def _has_begun(folder: Path, checkpoints: Checkpoints) -> bool:
    """Says whether there is a checkpoint to go on from; warns where there is none.

    Raises:
      UserError: If there was one, and it is gone.
    """
    if checkpoints.steps():
        return True
    metrics = folder / files.METRICS
    if metrics.exists() and metrics.stat().st_size:
        raise UserError(
            f"nothing to resume: {checkpoints.folder} holds no checkpoint, though "
            f"{metrics} tells of epochs; put the checkpoints back, or start again in "
            "another folder."
        )
    warnings.warn(
        f"the run in {folder} was ended before its first checkpoint; it starts from "
        "the beginning.",
        ResumeWarning,
        stacklevel=2,
    )
    return False
