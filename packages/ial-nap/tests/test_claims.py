"""What the method claims: on the task whose shortcut is known, and on real data with a shortcut planted.

The paper's data are not to be had; what is asserted is what holds here, and the README has the figures.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ial_nap.context import Context
from ial_nap.data import load_data
from ial_nap.experiments import Protocol, leak, loop, ranking
from ial_nap.influence import influence_on
from ial_nap.nap import FeatureNAP
from ial_nap.ranking import CER, uncertainty
from ial_nap.release import ReleaseNAP
from ial_nap.simulation import Oracle, Setting, score, simulate
from ial_nap.toys import SHORTCUT, shift_mask, shift_task
from ial_nap.training import Episodic, Plain, Training

pytestmark = pytest.mark.claims

SEEDS = (0, 1, 2)
KS = (1, 5, 20)


def hidden(mask, count, seed, share=0.5):
    drawn = mask.repeat(count, 1, 1)
    return drawn.masked_fill(torch.rand(drawn.shape, generator=torch.Generator().manual_seed(seed)) < share, -1)


def tasks(seed):
    train = shift_task(800, shift=1.2, seed=seed)
    return train, shift_task(2000, shift=0.0, seed=seed + 200, like=train)


def trained(series, seed):
    model = FeatureNAP.of(series, seed=seed)
    Training(model, Episodic(model), series, seed=seed).run()
    return model


def auroc(model, series):
    return score(model.predict(series.x, series.lengths, samples=8).mean, series)


@pytest.fixture(scope="module")
def measured():
    """AUROC on the unshifted test by what is known of the training's shortcut, one row a seed."""
    rows, models = [], []
    for seed in SEEDS:
        train, test = tasks(seed)
        model = trained(train, seed)
        row = {}
        contexts = {"none": Context(4, 12)}
        contexts |= {f"k{k}": Context.of(hidden(shift_mask(), k, seed)) for k in KS}
        contexts["irrelevant"] = Context.of(hidden(shift_mask(off=(4, 6)), 20, seed))
        contexts["causal"] = Context.of(hidden(shift_mask(off=(0, 1)), 20, seed))
        for name, context in contexts.items():
            model.update(context)
            row[name] = auroc(model, test)
            cells = model.contributions(test.x, test.lengths).cells.detach().abs()
            row[f"share_{name}"] = float(cells[:, :, list(SHORTCUT)].sum() / cells.sum())
        names = [train.features[d] for d in SHORTCUT]
        row["dropped"] = auroc(trained(train.without(names), seed), test.without(names))
        released = ReleaseNAP(12, 1, steps=4, seed=seed)
        Training(released, Plain(released), train, epochs=60, seed=seed).run()
        for name in ("none", "k20"):
            released.update(contexts[name])
            with torch.no_grad():
                row[f"release_{name}"] = score(released(test.x, test.lengths).logits, test)
        rows.append(row)
        models.append((model, train, test))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}, models


def test_verdicts_correct_the_model_without_training(measured):
    found, _ = measured
    assert found["none"].mean() <= 0.76
    assert (found["k5"] - found["none"]).mean() >= 0.08
    assert (found["dropped"] - found["k20"]).mean() <= 0.02
    for less, more in (("none", "k1"), ("k1", "k5"), ("k5", "k20")):
        assert (found[more] - found[less]).mean() > -0.01
    assert found["share_none"].mean() > 0.2
    assert found["share_k20"].max() == 0


def test_verdicts_on_what_does_not_matter_change_little_and_wrong_ones_harm(measured):
    found, _ = measured
    assert abs((found["irrelevant"] - found["none"]).mean()) < 0.02
    assert (found["none"] - found["causal"]).mean() >= 0.1


def test_the_released_schedule_does_not_react(measured):
    found, _ = measured
    assert np.abs(found["release_k20"] - found["release_none"]).max() < 0.01


def test_predictions_vary_less_when_more_is_known_but_the_latent_does_not(measured):
    """E6 asks that the latent's deviation fall with every mask; it does not, only the spread of predictions does."""
    _, models = measured
    for model, _, test in models:
        part, latent, spread = test.part(range(200)), [], []
        for k in (0, 50):
            model.update(Context.of(hidden(shift_mask(), k, 0)) if k else Context(4, 12))
            latent.append(float(model.gaussian().deviation.detach().mean()))
            spread.append(float(model.predict(part.x, part.lengths, samples=50).spread.mean()))
        model.update(Context(4, 12))
        assert spread[1] < 0.95 * spread[0]
        assert abs(latent[1] / latent[0] - 1) < 0.02


def test_rankings_of_features_find_the_shortcut(measured):
    """E4 (b): mean reciprocal rank of the first shortcut feature, at least twice that of a random order."""
    _, models = measured
    random = sum((12 - rank) / 66 / rank for rank in range(1, 12))
    for feature in ("counterfactual", "uncertainty"):
        found = []
        for model, train, _ in models:
            model.update(Context(4, 12))
            queue = CER(feature=feature, k=100, f=12).rank(model, train)
            ranks = [min(item.features.index(train.features[d]) for d in SHORTCUT) + 1 for item in queue]
            found.append(np.mean([1 / rank for rank in ranks]))
        assert np.mean(found) >= 2 * random, (feature, found)


def test_ranking_needs_fewer_verdicts_than_chance(measured):
    """E4 (c): mean AUROC over eight questions, two features of one instance each."""
    _, models = measured
    gains = []
    for seed, (model, train, test) in zip(SEEDS, models, strict=True):
        part, curves = test.part(range(1000)), []
        for cer in (CER(k=1, f=2), CER("random", "random", k=1, f=2)):
            context, left, curve = Context(4, 12), list(range(len(train))), []
            for question in range(8):
                model.update(context)
                item = cer.rank(model, train, among=left, seed=100 * seed + question)[0]
                left.remove(item.index)
                context.mark(item.instance, Oracle(shift_mask()).judge(item, train))
                model.update(context)
                curve.append(auroc(model, part))
            curves.append(np.mean(curve))
        model.update(Context(4, 12))
        gains.append(curves[0] - curves[1])
    assert min(gains) > 0
    assert np.mean(gains) > 0.02


def test_influence_finds_flipped_labels():
    """E4 (a): precision at 40 of 40 flipped labels among 500, whose base rate is 0.08."""
    found = []
    for seed in SEEDS:
        train = shift_task(500, shift=0.0, seed=seed)
        validation = shift_task(400, shift=0.0, seed=seed + 50, like=train)
        flipped = torch.randperm(500, generator=torch.Generator().manual_seed(seed))[:40]
        y = train.targets.clone()
        y[flipped] = 1 - y[flipped]
        train = replace(train, y=y)
        model = FeatureNAP.of(train, seed=seed)
        Training(model, Episodic(model), train, validation, epochs=60, seed=seed).run()
        is_flipped = torch.zeros(500)
        is_flipped[flipped] = 1
        by_influence = (-influence_on(model, train, validation).of(train)).argsort(descending=True)[:40]
        spread = uncertainty(model.predict(train.x, train.lengths, samples=8))
        by_spread = spread.argsort(descending=True)[:40]
        found.append([float(is_flipped[by_influence].mean()), float(is_flipped[by_spread].mean())])
    influence, spread = np.mean(found, 0)
    assert influence > 3 * 0.08, found
    assert influence > spread, found


def test_verdicts_obeyed_at_once_do_more_than_training_on_them():
    """E3, on the task whose shortcut is known: one round, against fine-tuning and against training anew."""
    train, test = tasks(0)
    validation = shift_task(200, shift=1.2, seed=100, like=train)
    found = {
        method: simulate(method, train, validation, test, Oracle(shift_mask()), Setting(epochs=60, rounds=1), seed=0)
        for method in ("ial-nap", "aila", "rrr", "drop")
    }
    before, after = (r.score for r in found["ial-nap"])
    assert after > before + 0.05
    assert after > found["drop"][1].score - 0.03
    for method in ("aila", "rrr"):
        assert after > found[method][1].score + 0.05


TUMOURS = Protocol(setting=Setting(rounds=2, k=3, f=2, epochs=100), trials=0)


def scores(found, method, at):
    return np.array([cell["rounds"][at][2] for cell in found.cells[method].values()])


def test_on_tumours_verdicts_do_what_leaving_features_out_and_training_anew_does():
    """E3 on splits that nothing was chosen on, and that are in none of the tables."""
    found = loop("cells", ("ial-nap", "aila", "drop"), (5, 6), TUMOURS)
    gain = scores(found, "ial-nap", -1) - scores(found, "ial-nap", 0)
    assert gain.min() > 0
    assert gain.mean() > 0.05
    assert (scores(found, "drop", -1) - scores(found, "ial-nap", -1)).mean() < 0.03
    assert (scores(found, "ial-nap", -1) - scores(found, "aila", -1)).mean() > 0.05


def test_on_tumours_influence_finds_flipped_labels_and_the_shortcut():
    """E4: at least three times the rate of flips, and the shortcut sooner than by chance; uncertainty does not."""
    cells = ranking("cells", (5, 6), TUMOURS, questions=2).cells
    mean = {name: np.mean(list(by.values())) for name, by in cells.items()}
    assert mean["flips found, influence"] > 3 * 0.08
    assert mean["flips found, influence"] > mean["flips found, uncertainty"]
    for feature in ("influence", "counterfactual"):
        assert mean[f"first shortcut, {feature}"] > 1.3 * mean["first shortcut, chance"]
    # The specification asks for twice chance of this one too; here it is no better than chance.
    assert mean["first shortcut, uncertainty"] < 1.3 * mean["first shortcut, chance"]


def test_on_diabetes_verdicts_take_back_part_of_a_leak():
    """E7: the error is nearer to that of a model that never saw the leak, yet ridge is as good as either."""
    cells = leak("diabetes", (5, 6), Protocol(columns=1, shift=5.0, setting=Setting(epochs=100))).cells
    mean = {name: np.mean(list(by.values())) for name, by in cells.items()}
    assert mean["leak, none"] > 1.1 * mean["clean"]
    assert mean["leak, 20 masks"] < 0.95 * mean["leak, none"]
    assert mean["ridge"] < 1.1 * mean["clean"]


def test_in_intensive_care_verdicts_take_back_most_of_a_shortcut(data_folder):
    """E3 on 4,000 stays of PhysioNet 2012."""
    setting = Setting(rounds=2, k=5, f=4, epochs=20)
    found = loop(load_data("physionet2012", hours=12), ("ial-nap", "drop"), (5,), Protocol(setting=setting, trials=0))
    gain = scores(found, "ial-nap", -1) - scores(found, "ial-nap", 0)
    assert gain.mean() > 0.05
    assert (scores(found, "drop", -1) - scores(found, "ial-nap", -1)).mean() < 0.06
