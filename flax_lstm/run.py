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

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax

from flax_lstm import data, environment
from flax_lstm import folder as files
from flax_lstm.checkpoint import Checkpoints
from flax_lstm.config import Config, UserError
from flax_lstm.environment import use_compilation_cache
from flax_lstm.epochs import Progress, Trainer
from flax_lstm.events import EpochDone, Event, Finished, RunStarted, StepDone
from flax_lstm.mesh import model_over_mesh
from flax_lstm.model_state import classifier, initial_state, restore, state_template
from flax_lstm.settings import (
    check_same_config,
    check_same_data,
    check_settings,
    recorded_config,
    with_absolute_paths,
)
from flax_lstm.startup import Startup
from flax_lstm.train import make_optimizer, parallelize
from flax_lstm.trained import Prediction, Run

__all__ = [
    "EpochDone",
    "Event",
    "Finished",
    "Prediction",
    "Run",
    "RunStarted",
    "StepDone",
    "train",
    "use_compilation_cache",
]


def train(
    config: Config,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    started: float | None = None,
) -> Run:
    """Trains, saves, restores what it saved, and tests it.

    Args:
      config: All settings.
      folder: The run's folder; the first unused of `runs/NAME-1`, … when None.
      resume: Goes on from the newest intact checkpoint in `folder`, exactly: the
        parameters at the end are those of a run that was never interrupted. The
        configuration must be the recorded one, but `epochs` may grow; a schedule is
        then stretched over the new number from where the run goes on.
      on_event: Called with each event of `flax_lstm.events`.
      started: When the time to the first step starts to count, by
        `time.perf_counter`; now when None.

    Returns:
      The run, with the parameters that were tested.

    Raises:
      UserError: If the request cannot be met: bad settings or data, a folder that
        holds a run (or none, with `resume`), or one that another process writes.
      NonFiniteLossError: If a loss is not finite; earlier checkpoints stay.
      CheckpointError: If a checkpoint cannot be written or read.
    """
    startup = Startup(time.perf_counter() if started is None else started)
    check_settings(config)
    config = with_absolute_paths(config)
    if folder is None:
        if resume:
            raise UserError("resume needs the folder of the run to go on with.")
        name = Path(config.data.data).stem or "run"
        folder = files.unused(Path("runs"), name)
    folder = Path(folder).resolve()
    if resume and not files.holds_run(folder):
        raise UserError(
            f"nothing to resume: {folder} holds no run (no {files.CONFIG}); start one "
            "there without --resume."
        )
    with files.writing(folder):
        if resume:
            check_same_config(recorded_config(folder), config, folder)
        elif files.holds_run(folder):
            raise UserError(
                f"{folder} already holds a run; continue it with --resume, or give "
                "another folder. Nothing was changed."
            )
        return _train(config, folder, resume, on_event or (lambda event: None), startup)


def _train(
    config: Config,
    folder: Path,
    resume: bool,
    on_event: Callable[[Event], None],
    startup: Startup,
) -> Run:
    """Trains with the folder's lock held."""
    corpus = data.load(config.data, config.training.seed)
    if resume:
        recorded = files.read_json(folder / files.SUMMARY)
        check_same_data(recorded["data"], corpus.summary, folder)
    lengths = corpus.bucket_lengths
    batches = data.batch_count(corpus.parts["train"], lengths, config.data)
    model = model_over_mesh(config.model, config.training.mesh)
    init, apply = classifier(model, corpus.tokenizer.vocabulary_size)
    optimizer = make_optimizer(config.training, batches * config.training.epochs)
    program = parallelize(apply, optimizer, config.training)
    template = state_template(config, init)
    summary = {
        "data": corpus.summary,
        "label_names": list(corpus.label_names),
        "tokenizer": corpus.tokenizer.fingerprint(),
        "batches": batches,
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(template.params)),
        "result": None,
    }
    with Checkpoints(folder / files.CHECKPOINTS) as checkpoints:
        progress = Progress()
        if resume:
            if not checkpoints.steps():
                raise UserError(
                    f"nothing to resume: no checkpoint was saved in {folder}; start "
                    "again in another folder."
                )
            state, meta = checkpoints.restore_last(template)
            progress = Progress(**meta["progress"])
        else:
            corpus.tokenizer.save(folder / files.TOKENIZER)
            state = initial_state(config, init, jax.random.key(config.training.seed))
        files.write_json(
            folder / files.ENVIRONMENT, environment.describe(program.devices)
        )
        files.write_json(folder / files.SUMMARY, summary)
        files.write_json(folder / files.CONFIG, config.to_dict())
        meta = {"tokenizer": summary["tokenizer"]}
        if not resume:  # so that a run can be resumed from its first moment on
            checkpoints.save(
                0,
                state,
                {**meta, "progress": dataclasses.asdict(progress)},
                metric=math.nan,
            )
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
            )
        )
        began = time.perf_counter()
        with open(folder / files.METRICS, "w", encoding="utf-8") as metrics_file:
            for record in progress.history:
                files.write_line(metrics_file, record)
            trainer = Trainer(
                config=config,
                corpus=corpus,
                lengths=lengths,
                batches=batches,
                program=program,
                checkpoints=checkpoints,
                metrics_file=metrics_file,
                on_event=on_event,
                meta=meta,
                startup=startup,
            )
            placed = trainer.run(program.place_state(state), progress)
        del placed
        # What is tested is what is on disk.
        state, meta = restore(checkpoints, template, config)
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
            wait_share=progress.wait_share(),
        )
    result = {
        name: value
        for name, value in dataclasses.asdict(finished).items()
        if name != "folder"
    }
    result["best_validation_accuracy"] = progress.best_accuracy
    files.write_json(folder / files.SUMMARY, {**summary, "result": result})
    on_event(finished)
    return Run(
        folder=folder,
        config=config,
        tokenizer=corpus.tokenizer,
        label_names=corpus.label_names,
        metrics={**result, "epochs": progress.history},
        lengths=lengths,
        params=state.params,
    )
