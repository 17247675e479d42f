"""Transfer in one page: pretrain an S4 on the digits 0-4, then teach it 5-9 in four ways.

Images of scikit-learn's digits are read pixel by pixel, as sequences of 64 numbers. One network of
ten outputs is used throughout; each task chooses among its own five classes (task-incremental
learning), and the column ``all`` asks for all ten. The ways to transfer:

* ``fine-tuning``: all parameters, from the pretrained ones;
* ``LoRA``: low-rank changes of the projections, everything else frozen (Hu et al. 2022);
* ``EWC``: all parameters, held by the Fisher diagonal of the old task (Kirkpatrick et al. 2017);
* ``task vector``: part of the way from the pretrained to the fine-tuned parameters (Ilharco et al.
  2023); how far is chosen on validation data.
"""

import jax
import numpy as np

from transfer_jax import trees
from transfer_jax.data import Pipeline, load, select_classes
from transfer_jax.models import SequenceClassifier
from transfer_jax.objectives import Classification, LowRank, Penalized, Variables, WarmStart
from transfer_jax.training import Experiment
from transfer_jax.trees.paths import PyTree

OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def recipe(exp: Experiment) -> None:
    cfg = exp.config
    splits = load("digits", sequence=True, seed=cfg.seed).splits
    model = SequenceClassifier(num_classes=10, l_max=64, **cfg.model.to_dict())
    both = Classification(module=model)
    old_task, new_task = both.replace(classes=OLD), both.replace(classes=NEW)

    def train(name: str, classes: tuple[int, ...]) -> Pipeline:
        source = select_classes(splits["train"], classes)
        return Pipeline(source, cfg.batch_size, shuffle=True, seed=exp.seed(name), repeat=True)

    def held_out(split: str, classes: tuple[int, ...] = OLD + NEW) -> Pipeline:
        return Pipeline(select_classes(splits[split], classes), cfg.batch_size)

    def accuracy(variables: Variables, split: str) -> tuple[float, float, float]:
        """Of the old task, the new task, and among all ten classes."""
        return tuple(
            exp.evaluate(task, variables, held_out(split, classes))["accuracy"]
            for task, classes in ((old_task, OLD), (new_task, NEW), (both, OLD + NEW))
        )  # type: ignore[return-value]

    source = exp.fit(
        "pretrain", old_task, train("pretrain", OLD), cfg.pretrain,
        evaluate={"validation": held_out("validation", OLD)},
    )  # fmt: skip
    params = source.params

    def log_probs(params: PyTree, batch: dict) -> jax.Array:
        logits = old_task.predict(Variables(params, {}), batch)
        return jax.nn.log_softmax(logits[:, np.array(OLD)])

    fisher = exp.artifact(
        "fisher",
        lambda: trees.fisher_diagonal(
            log_probs, params, exp.batches(held_out("train", OLD)), mask=lambda b: b["mask"]
        ),
    )

    start = WarmStart(inner=new_task, params=params)
    ways = {
        "fine-tuning": (start, cfg.transfer),
        "LoRA": (
            LowRank.of(start, params, cfg.lora.where, rank=cfg.lora.rank, train=cfg.lora.train),
            cfg.lora.fit,
        ),
        "EWC": (
            Penalized(inner=start, anchor=params, fisher=fisher, strength=cfg.ewc.strength),
            cfg.transfer,
        ),
    }
    rows = [_row("pretrained", accuracy(source.variables, "test"), source.summary)]
    fitted = {}
    for name, (objective, fit) in ways.items():
        stage = name.lower()
        result = fitted[name] = exp.fit(
            stage, objective, train(stage, NEW), fit,
            evaluate={"validation": held_out("validation", NEW)},
        )  # fmt: skip
        variables = result.variables
        if isinstance(objective, LowRank):
            variables = objective.inner_variables(variables)
        rows.append(_row(name, accuracy(variables, "test"), result.summary))

    tuned = fitted["fine-tuning"]
    vector = trees.task_vector(tuned.params, params)
    shares = [float(s) for s in cfg.task_vector.shares]
    merged = [Variables(trees.apply_task_vectors(params, [vector], s), {}) for s in shares]
    curve = [accuracy(variables, "validation")[:2] for variables in merged]
    best = int(np.argmax([sum(pair) for pair in curve]))
    rows.append(
        _row(f"task vector x {shares[best]:g}", accuracy(merged[best], "test"), tuned.summary)
    )

    columns = ["way", "old (0-4)", "new (5-9)", "all ten", "trained parameters", "seconds"]
    exp.table("Test accuracy", columns, rows)
    exp.bars(
        "Test accuracy of old and new classes",
        [row[0] for row in rows],
        {"old (0-4)": [row[1] for row in rows], "new (5-9)": [row[2] for row in rows]},
        ylabel="accuracy",
    )
    exp.curve(
        "Along the task vector (validation)",
        shares,
        {"old (0-4)": [a for a, _ in curve], "new (5-9)": [b for _, b in curve]},
        xlabel="share of the task vector",
        ylabel="accuracy",
    )


def _row(name: str, accuracies: tuple[float, float, float], summary: dict) -> list:
    return [name, *(round(a, 4) for a in accuracies), summary["parameters"],
            round(summary["seconds"], 1)]  # fmt: skip
