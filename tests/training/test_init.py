"""`--init`: a new run that begins with another run's backbone and objective."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import config as configurations
from pipeline import pretrain
from pipeline.errors import UserError
from pipeline.training import step
from pipeline.training.run_folder import RunFolder

SMALL = [
    *("--engine", "local", "--loader", "opencv", "--image-size", "16", "--batch-size", "8", "--knn-every", "0"),
    *("--precision", "fp32", "--objective", "mae", "--options.decoder-width", "16", "--options.decoder-depth", "1"),
    *("--options.decoder-heads", "2", "--epochs", "1", "--backbone", "lenet5"),
]


def test_a_run_begins_with_the_weights_of_another(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "photos").mkdir()
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    common = [
        *SMALL,
        "--data",
        str(tmp_path / "photos"),
        "--cache",
        str(tmp_path / "cache"),
        "--storage",
        str(tmp_path),
    ]
    assert pretrain.main([*common, "--run", str(tmp_path / "one")]) == 0
    one = RunFolder(str(tmp_path / "one"))
    saved = one.load_checkpoint(one.checkpoints()[-1])

    config = configurations.read(saved["config"], "one")
    monkeypatch.chdir(tmp_path)
    other = step.build(configurations.dataclasses.replace(config, seed=7))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    step.warm_start("one", other)
    assert any(not torch.equal(before[name], value) for name, value in other.state_dict().items())
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, saved["objective"][name], rtol=0, atol=0)

    wider = step.build(configurations.dataclasses.replace(config, options={**config.options, "decoder_width": 32}))
    with pytest.raises(UserError, match="--init one: is of another backbone, objective or image size"):
        step.warm_start("one", wider)
    with pytest.raises(UserError, match="--init nowhere: holds no checkpoint"):
        step.warm_start("nowhere", other)

    assert pretrain.main([*common, "--run", str(tmp_path / "two"), "--init", "one", "--lr", "1e-12"]) == 0
    two = RunFolder(str(tmp_path / "two"))
    assert configurations.load(tmp_path / "two" / "config.yaml").init == str(tmp_path / "one")
    for name, value in two.load_checkpoint(two.checkpoints()[-1])["objective"].items():
        torch.testing.assert_close(value, saved["objective"][name], rtol=0, atol=1e-6)
