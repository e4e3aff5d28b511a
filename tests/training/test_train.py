import pytest


def test_the_test_split_is_read_once_and_last(tmp_path, monkeypatch, train_tiny):
    from capsexp.dataset.digits import Digits

    reads = []
    real = Digits.read
    monkeypatch.setattr(Digits, "read", lambda self, split: (reads.append(split), real(self, split))[1])
    train_tiny(tmp_path)
    assert reads == ["train", "test"]


def test_max_steps_ends_a_run_in_the_middle_of_an_epoch(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path, "trainer.max_steps=7")
    assert max(line["step"] for line in metrics_of(tmp_path)) == 7


def test_one_batch_can_be_memorized(tmp_path, train_tiny, metrics_of):
    overrides = ["trainer=overfit", "model.conv_channels=32", "model.primary_types=8"]
    overrides += ["trainer.max_epochs=60", "trainer.batch_size=32", "trainer.limit_train_batches=1"]
    overrides += ["trainer.validate_every=60", "trainer.images_every=100", "trainer.save_every=100"]
    train_tiny(tmp_path, *overrides, "optimizer.lr.start=0.005")
    lines = metrics_of(tmp_path)
    accuracy = next(line["validation/accuracy"] for line in lines if "validation/accuracy" in line)
    assert accuracy == 1.0
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.1 * losses[0]


def test_bfloat16_trains_close_to_float32(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path / "half", "trainer.precision=bfloat16")
    train_tiny(tmp_path / "full")
    half, full = (metrics_of(tmp_path / name)[0]["train/loss"] for name in ("half", "full"))
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


@pytest.mark.compile
def test_a_compiled_run_learns_like_a_plain_one_with_the_same_checkpoint_keys(
    tmp_path, train_tiny, metrics_of, final_state
):
    train_tiny(tmp_path / "plain", "trainer.max_steps=3")
    train_tiny(tmp_path / "compiled", "trainer.max_steps=3", "trainer.compile=true")
    plain, compiled = (metrics_of(tmp_path / name) for name in ("plain", "compiled"))
    assert compiled[2]["train/loss"] == pytest.approx(plain[2]["train/loss"], rel=1e-4)
    names = [set(final_state(tmp_path / name)["model"]) for name in ("plain", "compiled")]
    assert names[0] == names[1]
