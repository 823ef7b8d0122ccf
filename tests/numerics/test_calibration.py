"""Clipping while reading, calibrated by training: from a checkpoint's histograms to the exported model."""

import json
import math

import pytest
import torch

from exported_models import CHUNK, build, close, texts
from inplace_ttt.config import UserError
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.hf import modeling_inplace_ttt as exported
from inplace_ttt.hf.calibration import HISTOGRAMS, choose_clip, update_norms
from inplace_ttt.hf.convert import export_checkpoint, import_checkpoint
from inplace_ttt.training.update_histograms import LastHistograms
from inplace_ttt.ttt import histogram


def noted(path, *ratios):
    """Write the file of a checkpoint whose steps had these updates, by layer."""
    last = LastHistograms()
    for step, layers in enumerate(ratios):
        counts = {str(layer): histogram.count(torch.tensor(values)).tolist() for layer, values in layers.items()}
        sparse = {layer: {str(n): c for n, c in enumerate(row) if c} for layer, row in counts.items()}
        last.add({"step": step, "update_histogram": sparse})
    (path / HISTOGRAMS).write_text(json.dumps(last.contents()))


def test_quantiles_of_the_second_half(tmp_path):
    early, late = torch.full((100,), 1e-6), torch.logspace(-4, -2, 1001)
    noted(tmp_path, {0: early, 2: early}, {0: late, 2: 3 * late})
    norms = update_norms(tmp_path, [0, 2])
    assert sorted(norms) == ["p50", "p95", "p99"]
    for name, q in histogram.QUANTILES.items():
        exact = 10 ** (-4 + 2 * q)
        assert norms[name] == [pytest.approx(exact, rel=0.05), pytest.approx(3 * exact, rel=0.05)]
    assert update_norms(tmp_path, [0, 1]) is None and update_norms(tmp_path / "none", [0]) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("bins"),
        lambda content: content["bins"].update(per_decade=7),
        lambda content: content.update(histograms=3),
        lambda content: content["histograms"][0]["layers"].update({"0": {"9999": 1}}),
        lambda content: content["histograms"][0]["layers"].update({"0": {"5": "x"}}),
        lambda content: content["histograms"][0]["layers"].update({"0": [1]}),
    ],
)
def test_damaged_histograms(tmp_path, damage):
    noted(tmp_path, {0: [0.1]})
    content = json.loads((tmp_path / HISTOGRAMS).read_text())
    damage(content)
    (tmp_path / HISTOGRAMS).write_text(json.dumps(content))
    with pytest.raises(UserError, match="is damaged"):
        update_norms(tmp_path, [0])


def test_words_of_clip():
    norms = dict(p50=[0.1, 0.2], p95=[0.0, 0.3], p99=[0.4, 0.5])
    assert choose_clip("trained", 0.5, norms, "x") == 0.5 and choose_clip("none", 0.5, norms, "x") is None
    assert choose_clip("p99", None, norms, "x") == [0.4, 0.5] and choose_clip("0.01", None, None, "x") == 0.01
    for word, kept, message in [
        ("p95", norms, "close to zero"), ("p50", None, "has no histograms"), ("p90", norms, "p50, p95, p99"),
        ("0", norms, "is not valid"), ("nan", norms, "is not valid"), ("1e39", norms, "is not valid"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            choose_clip(word, None, kept, "x")


@torch.no_grad()
def test_exported_and_read(tmp_path):
    """A list of clips is that of each layer, in the operation and without it, and comes back from an import."""
    model, text = build("qwen3"), texts(1, 5 * CHUNK)
    model.save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "imported")
    noted(tmp_path / "imported", {0: [0.1], 2: [0.5]})
    export_checkpoint(tmp_path / "imported", tmp_path / "out", clip="p95")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["ttt_clip"] == config["ttt_update_norms"]["p95"] == pytest.approx([0.1, 0.5], rel=0.2)
    clipped = exported.InPlaceTTTQwen3ForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert [mlp.clip for mlp in clipped.fast_mlps] == config["ttt_clip"]
    by_operation = clipped(text).logits
    assert not close(by_operation, model(text).logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "fast_weight_linear", None)
        assert close(clipped(text).logits, by_operation)
    import_checkpoint(tmp_path / "out", tmp_path / "again")  # training knows nothing of it; an export has it as it came
    export_checkpoint(tmp_path / "again", tmp_path / "back")
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert all(back[key] == config[key] for key in ("ttt_clip", "ttt_update_norms"))
    export_checkpoint(tmp_path / "again", tmp_path / "none", clip="none")
    assert json.loads((tmp_path / "none/config.json").read_text())["ttt_clip"] is None
    for key, value in [("ttt_clip", [0.1]), ("ttt_clip", [0.1, -1]), ("ttt_update_norms", {"p50": [1]}),
                       ("ttt_update_norms", [1, 2])]:  # fmt: skip
        (tmp_path / "out/config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=f"has {key}.*a number for each TTT layer"):
            import_checkpoint(tmp_path / "out", tmp_path / "damaged")
    with pytest.raises(ValueError, match="must be one number, or one for each"):
        exported.InPlaceTTTQwen3ForCausalLM(exported.InPlaceTTTQwen3Config(**{**config, "ttt_clip": [0.1]}))


def test_modes():
    assert str(FastWeightMode.parse("clip=none")) == "clip=none" and FastWeightMode.parse("clip=none").clip == math.inf
    assert FastWeightMode.parse("clip=none").clip_of(0.1) is None and FastWeightMode.parse("on").clip_of(0.1) == 0.1
    assert FastWeightMode.parse("clip=0.5").clip_of(0.1) == 0.5
