"""A run is continued on the images that it was trained on, and on no others."""

import shutil

from pipeline import pretrain
from tests.chaos.runs import Place, losses


def test_images_that_changed_since_are_refused_and_trained_on_from_the_weights(tmp_path, capsys):
    place = Place(tmp_path)
    run = place.train("one", "--epochs", "1")
    before = run.checkpoints(), losses(run)
    for i in range(8):
        shutil.copy(place.photos / "b" / f"{2 * i + 1}.png", place.photos / "b" / f"again{i}.png")
    for again in (["--run", run.address], ["--resume", run.address]):
        assert pretrain.main([*place.words("one", "--epochs", "1"), *again]) == 2
        said = capsys.readouterr().err
        assert "its training images are no longer those it was trained on (" in said
        assert " images → " in said
        assert f"--init {run.address}" in said
    assert (run.checkpoints(), losses(run)) == before
    assert losses(place.train("two", "--epochs", "1", "--init", run.address))
