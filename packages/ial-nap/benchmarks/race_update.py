"""Race: obeying verdicts by conditioning against fine-tuning on them and against dropping features and training anew.

    python benchmarks/race_update.py [--annotations 1000 --repeats 5 --seeds 0 1 --epochs 80 --most 200 --json FILE]

On the task whose shortcut is known (features 8 and 9 give the label away in training and are noise in the test), an
oracle gives that many masks, 0 on these and 1 on all others, half of all cells hidden. Four ways to learn from them are
timed in one process:

* update: :meth:`ial_nap.FeatureNAP.update`, no gradient;
* finetune-50: 50 steps of Adam on what makes attention, all annotated instances a step, as the paper's release does;
* drop-and-retrain: leave out what a majority marked 0, and train a plain model anew to its early stopping;
* plain + 50: the same steps on uncertainty-aware attention with the masks on its weights, as "random-ua" does.

Beside each time stands the AUROC on the test that it comes to. To the same score: how many steps of fine-tuning alone,
no context set, take the model to within 0.01 of what its update comes to, counted in tens up to `--most`. Seconds are
medians over repeats of all seeds, the ratio is to the update's. What an update takes of the processor, whatever runs
beside it, is a mean over 20 of each seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ial_nap.attention import Uncertain
from ial_nap.baselines import Annotated, heed, majority_off, masked_logits
from ial_nap.context import Context
from ial_nap.episodes import Episodes
from ial_nap.nap import FeatureNAP
from ial_nap.series import Series
from ial_nap.simulation import score
from ial_nap.toys import shift_mask, shift_task
from ial_nap.training import Episodic, Plain, Training, finetune, losses


def annotated(train: Series, count: int, seed: int) -> tuple[Context, Series]:
    """Return masks of as many annotations, by several annotators where instances are fewer, and their instances."""
    random = torch.Generator().manual_seed(seed)
    masks = shift_mask().repeat(count, 1, 1)
    masks = masks.masked_fill(torch.rand(masks.shape, generator=random) < 0.5, -1)
    places = [k % len(train) for k in range(count)]
    people = [f"annotator {k // len(train)}" for k in range(count)]
    context = Context.of(masks, ids=[train.ids[k] for k in places], annotators=people, schema=train.schema)
    return context, train.part([{name: k for k, name in enumerate(train.ids)}[i] for i, _ in context.keys])


def plainly(train: Series, validation: Series, epochs: int, seed: int) -> FeatureNAP:
    """Train a model without verdicts."""
    model = FeatureNAP.of(train, latent=0, seed=seed)
    episodes = Episodes(model.steps, model.features, empty=1.0)
    Training(model, Episodic(model, episodes=episodes, gate=0.0), train, validation, epochs=epochs, seed=seed).run()
    return model


def auroc(model: FeatureNAP, test: Series) -> float:
    """Score by eight draws."""
    return score(model.predict(test.x, test.lengths, samples=8).mean, test)


def timed(run: Callable[[], object]) -> tuple[float, object]:
    """Return seconds and what came out."""
    begun = time.perf_counter()
    found = run()
    return time.perf_counter() - begun, found


def until(model: FeatureNAP, seen: Series, context: Context, test: Series, goal: float, most: int) -> int | None:
    """Count steps of fine-tuning, in tens, until the score is as good; None where it never is."""
    tuned = copy.deepcopy(model)
    for steps in range(0, most + 1, 10):
        if auroc(tuned, test) >= goal:
            return steps
        tuned.update(Context(tuned.steps, tuned.features))
        finetune(tuned, seen, context, steps=10, seed=steps)
        # What the steps taught, not the context: nothing is set while it is scored.
        tuned.update(Context(tuned.steps, tuned.features))
    return None


def main() -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--most", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    steps_needed: list[int | None] = []
    busy: list[float] = []
    for seed in settings.seeds:
        train = shift_task(800, shift=1.2, seed=seed)
        validation = shift_task(200, shift=1.2, seed=seed + 100, like=train)
        test = shift_task(2000, shift=0.0, seed=seed + 200, like=train)
        model = FeatureNAP.of(train, seed=seed)
        Training(model, Episodic(model, seed=seed), train, validation, epochs=settings.epochs, seed=seed).run()
        ua = Uncertain(len(train.features), 1, seed=seed)
        Training(ua, Plain(ua), train, validation, epochs=settings.epochs, seed=seed).run()
        context, seen = annotated(train, settings.annotations, seed)
        scores.setdefault("no annotation", []).append(auroc(model, test))

        def update(model: FeatureNAP = model, context: Context = context) -> FeatureNAP:
            model.update(context)
            return model

        def tune(model: FeatureNAP = model, context: Context = context, seen: Series = seen) -> FeatureNAP:
            tuned = copy.deepcopy(model)
            finetune(tuned, seen, context, steps=50)
            return tuned

        def plain_tune(ua: Uncertain = ua, context: Context = context, train: Series = train) -> Uncertain:
            tuned, marked = copy.deepcopy(ua), Annotated.of(train, context)
            for parameter in (*tuned.embedding.parameters(), *tuned.output.parameters()):
                parameter.requires_grad_(False)

            def loss(random: torch.Generator) -> torch.Tensor:
                logits = masked_logits(tuned, marked.series, marked.masks, random)
                return losses(logits, marked.series.targets, marked.series.kind).mean()

            heed(tuned, loss, None, lambda _series, _random: torch.zeros(()), steps=50)
            return tuned

        def retrain(
            train: Series = train, validation: Series = validation, context: Context = context, seed: int = seed
        ) -> FeatureNAP:
            off = majority_off(context).tolist()
            gone = [name for name, is_off in zip(train.features, off, strict=True) if is_off]
            return plainly(train.without(gone), validation.without(gone), settings.epochs, seed)

        for turn in range(settings.repeats):
            for name, run in (("update", update), ("finetune-50", tune)):
                took, found = timed(run)
                seconds.setdefault(name, []).append(took)
                if not turn:
                    assert isinstance(found, FeatureNAP)
                    scores.setdefault(name, []).append(auroc(found, test))
        begun = time.process_time()
        for _ in range(20):
            update()
        busy.append((time.process_time() - begun) / 20)
        took, tuned_plain = timed(plain_tune)
        seconds.setdefault("plain + 50", []).append(took)
        with torch.no_grad():
            assert isinstance(tuned_plain, Uncertain)
            scores.setdefault("plain + 50", []).append(score(tuned_plain(test.x, test.lengths).logits, test))
        took, smaller = timed(retrain)
        seconds.setdefault("drop-and-retrain", []).append(took)
        off = majority_off(context).tolist()
        kept_test = test.without([name for name, is_off in zip(test.features, off, strict=True) if is_off])
        assert isinstance(smaller, FeatureNAP)
        scores.setdefault("drop-and-retrain", []).append(auroc(smaller, kept_test))
        model.update(Context(model.steps, model.features))
        steps_needed.append(until(model, seen, context, test, scores["update"][-1] - 0.01, settings.most))

    middle = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{settings.annotations} annotations, T=4, r=12; {len(settings.seeds)} seeds; test AUROC is a mean:")
    print(f"  {'no annotation':17} {'':>12} {'':>9}   AUROC {statistics.mean(scores['no annotation']):.3f}")
    for name, value in middle.items():
        ratio = value / middle["update"]
        print(f"  {name:17} {1e3 * value:9.2f} ms {ratio:8.1f}x   AUROC {statistics.mean(scores[name]):.3f}")
    print(f"  processor time of an update: {', '.join(f'{1e3 * value:.2f} ms' for value in busy)}")
    words = [f"more than {settings.most}" if n is None else str(n) for n in steps_needed]
    print(f"  steps of fine-tuning alone, no context set, until within 0.01 of update's score: {', '.join(words)}")
    if settings.json:
        text = {"median_seconds": middle, "scores": scores, "steps_needed": steps_needed, "processor": busy}
        settings.json.write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
