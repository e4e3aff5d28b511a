import shutil

import pytest
import torch
import yaml

from capsexp.analysis.attack.attacker import predicted
from capsexp.analysis.trained_run import TrainedRun
from capsexp.config.compose import conf_dir
from capsexp.errors import UserError
from capsexp.study.attacks import Attacks

QUICK = {
    "epsilons": [0, 0.1, 0.3],
    "targeted_epsilons": [0, 0.2],
    "steps": 3,
    "pgd_steps": 3,
    "restarts": 1,
    "pictures": 3,
}
SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=5")  # where nothing need be learnt
STANDARDISED = ("dataset.preprocess.standardise=last",)


def settings(**changes):
    with open(f"{conf_dir()}/study/attacks.yaml") as file:
        node = yaml.safe_load(file)
    del node["_target_"]
    return node | QUICK | changes


def study(**changes):
    return Attacks(**settings(**changes))


def test_curves_begin_at_clean_accuracy_and_the_worst_is_at_most_every_other(subject):
    one = subject(limit=60)
    numbers, figures, _ = study(targeted=["bim"])(one)
    right = torch.cat([output.scores.argmax(1) == batch.labels for batch, output in one.outputs()])
    counted = torch.cat([output.scores.argmax(1).bincount(minlength=10) for _, output in one.outputs()])
    assert (numbers["pictures"], counted.sum()) == (60, 60)
    clean = right.float().mean().item()
    assert 0.3 < clean < 1
    lines = numbers["untargeted"]
    assert set(lines) == {"epsilons", "fgsm", "bim", "pgd own", "pgd difference", "worst"}
    for name in set(lines) - {"epsilons"}:
        assert lines[name][0] == pytest.approx(clean)
        assert all(worst <= line for worst, line in zip(lines["worst"], lines[name], strict=True))
        assert numbers[f"accuracy_{name.replace(' ', '_')}"] == lines[name][-1]
    assert lines["worst"][-1] < clean
    assert set(figures) == {"attacks-untargeted", "attacks-targeted", "attacks-pictures"}
    assert lines["epsilons"] == {"input": [0, 0.1, 0.3], "pixel": pytest.approx([0, 25.5, 76.5])}


def test_success_without_an_attack_is_the_share_predicted_as_each_class(subject):
    one = subject(limit=60)
    numbers, *_ = study(attacks=["fgsm"], targeted=["fgsm", "pgd"])(one)
    wrong = (
        sum((output.scores.argmax(1) != batch.labels).sum().item() for batch, output in one.outputs()) / 60
    )
    for attack in ("fgsm", "pgd own", "pgd difference"):
        line, others = numbers["targeted"][attack], numbers["targeted"]["wrong_classes"][attack]
        assert line[0] == pytest.approx(0.1)  # each picture is predicted as one of ten
        assert others[0] == pytest.approx(wrong / 9)
        assert line[1] > line[0]
        assert line[1] - others[1] * 0.9 <= 0.1 + 1e-9  # what is left are pictures sent to their own class
    # A radius of the other list: what an aimed attack broke counts for the worst.
    assert numbers["untargeted"]["worst"][2] <= numbers["untargeted"]["fgsm"][2]


def test_numbers_do_not_depend_on_the_batch_size_and_hang_on_the_seed(subject):
    one, found = subject(limit=60), []
    for batch_size, seed in ((32, 0), (7, 0), (32, 1)):
        one.components.trainer.batch_size = batch_size
        numbers, *_ = study(targeted=[], epsilons=[0.04, 0.08], seed=seed, pgd_steps=1, pgd_step_size=0.01)(
            one
        )
        found.append(numbers)
    for name, line in found[0]["untargeted"].items():
        if name != "epsilons":
            assert found[1]["untargeted"][name] == pytest.approx(line)
    assert found[0]["gradients"]["own"]["mean_size"] == pytest.approx(
        found[1]["gradients"]["own"]["mean_size"]
    )
    assert found[0]["untargeted"] != found[2]["untargeted"]


def test_gradients_at_the_pictures_are_told(subject):
    one = subject(*SHORT, limit=20)
    numbers, *_ = study(attacks=["fgsm"], targeted=[])(one)
    lively = numbers["gradients"]
    for name in ("own", "difference"):
        assert lively[name]["pictures_without_gradient"] == 0
        assert lively[name]["share_exactly_zero"] < 0.5
        assert lively[name]["mean_size"] > 0
    # Capsules of length 0 pass nothing on.
    with torch.no_grad():
        one.model.class_caps.weight.zero_()
    numbers, *_ = study(attacks=["fgsm", "bim"], targeted=[])(one)
    for name in ("own", "difference"):
        assert numbers["gradients"][name] == {
            "share_exactly_zero": 1,
            "pictures_without_gradient": 1,
            "mean_size": 0,
        }
    assert numbers["untargeted"]["bim"] == [numbers["accuracy"]] * 3


def test_units_of_pixels_are_those_of_the_input_at_the_pictures_scale(subject):
    one = subject(*SHORT, *STANDARDISED, limit=40)
    pictures = torch.cat([batch.pixels.flatten(1).double() for batch in one.batches()])
    deviation = pictures.std(1, correction=0)
    numbers, *_ = study(attacks=["fgsm"], targeted=[], clip=False)(one)
    wanted = [epsilon * 255 * deviation.mean().item() for epsilon in (0, 0.1, 0.3)]
    assert numbers["untargeted"]["epsilons"]["pixel"] == pytest.approx(wanted)
    numbers, *_ = study(attacks=["fgsm"], targeted=[], units="pixel", epsilons=[0, 8, 32])(one)
    wanted = [epsilon / 255 / (1 / (1 / deviation).mean().item()) for epsilon in (0, 8, 32)]
    assert numbers["untargeted"]["epsilons"]["input"] == pytest.approx(wanted)
    assert numbers["untargeted"]["epsilons"]["pixel"] == [0, 8, 32]
    assert numbers["pictures_without_scale"] == 0


def test_the_papers_curves_are_drawn_beside_its_own_data_and_units_only(subject):
    one = subject(*SHORT, *STANDARDISED, limit=10)
    only = {"attacks": ["fgsm"], "targeted": [], "epsilons": [0, 0.1]}
    numbers, figures, _ = study(**only)(one)
    assert numbers["paper"] == "left out: it is on smallnorb, standardised"
    assert len(figures["attacks-untargeted"].axes[0].lines) == 3
    mine = settings()["paper"] | {"dataset": "digits"}
    numbers, figures, _ = study(**only, paper=mine)(one)
    assert numbers["paper"]["untargeted"]["capsules"]["bim"][-1] == 0.545
    assert len(figures["attacks-untargeted"].axes[0].lines) == 7
    numbers, *_ = study(**only, paper=mine, units="pixel")(one)
    assert numbers["paper"] == "left out: its unit is most likely that of the network's input"
    assert study(**only, paper=None)(one).numbers["paper"] is None


def other_run(path, train_tiny, *words):
    train_tiny(path, *words)
    (path / ".hydra").mkdir()
    shutil.copy(path / "resolved_config.yaml", path / ".hydra" / "config.yaml")
    return str(path)


def test_examples_of_a_run_on_itself_are_those_of_the_white_box(subject, tmp_path, train_tiny):
    one = subject(limit=40)
    (one.path / ".hydra").mkdir()
    shutil.copy(one.path / "resolved_config.yaml", one.path / ".hydra" / "config.yaml")
    numbers, figures, _ = study(targeted=[], source=str(one.path))(one)
    for attack in ("fgsm", "bim"):
        assert numbers["transfer"][f"{attack} on run"] == numbers["untargeted"][attack]
        assert numbers["transfer"][f"{attack} on source"] == numbers["untargeted"][attack]
    assert len(figures["attacks-transfer"].axes[0].lines) == 7
    other = other_run(tmp_path / "other", train_tiny, "seed=1")
    numbers, *_ = study(targeted=[], source=other)(one)
    source = TrainedRun(one.other_run(other).model, one.components, path=one.path, step=one.step, limit=40)
    alone, *_ = study(targeted=[], attacks=["fgsm", "bim"])(source)
    for attack in ("fgsm", "bim"):
        assert numbers["transfer"][f"{attack} on source"] == alone["untargeted"][attack]
        assert numbers["transfer"][f"{attack} on run"][-1] >= numbers["untargeted"]["worst"][-1]
        assert numbers["transfer"][f"{attack} on run"] != numbers["transfer"][f"{attack} on source"]


def test_a_source_that_takes_other_pictures_is_refused(subject, tmp_path, train_tiny):
    one = subject(*SHORT, limit=5)
    for name, words, told in (
        ("standardised", STANDARDISED, r"its standardise must be None, as here, got last"),
        (
            "large",
            ("dataset.preprocess.resize=10",),
            r"its picture shape must be \(1, 8, 8\), as here, got \(1, 10",
        ),
    ):
        run = other_run(tmp_path / name, train_tiny, "trainer.max_epochs=1", *words)
        with pytest.raises(UserError, match=rf"^study\.source: {told}"):
            study(source=run)(one)
    run = other_run(tmp_path / "same", train_tiny, "trainer.max_epochs=1")
    one.components.dataset.classes = tuple("abcdefghij")
    with pytest.raises(
        UserError, match=r"^study\.source: its classes must be a, b, c, d, e, f, g, h, i, j, as"
    ):
        study(source=run)(one)
    one.components.dataset.classes = ("a", "b")
    with pytest.raises(UserError, match=r"^study\.source: its number of classes must be 2, as here, got 10$"):
        study(source=run)(one)


def test_pictures_of_several_classes_are_refused(subject):
    one = subject(*SHORT, limit=5)
    one.components.dataset.labels_per_image = 2
    with pytest.raises(
        UserError, match=r"^this study needs pictures of one class each; those of digits have 2$"
    ):
        study()(one)


def test_shown_pictures_are_right_of_different_classes_and_attacked_as_told(subject):
    one = subject(limit=60)
    made = study(attacks=["fgsm"], targeted=[], pictures=4, shown=[0.1, 0.4])
    attacker = made._attacker(one)
    batch = next(one.batches())
    picked = {}
    right = predicted(one.model, batch.images) == batch.labels
    made._pick(batch, right, attacker.slope(batch), picked)
    assert len(picked) == 4
    for label, (alone, slope) in picked.items():
        shown = made._attacked(attacker, alone, slope)
        assert (shown.label, shown.predictions[0]) == (label, label)
        torch.testing.assert_close(shown.pixels[:1], alone.pixels)
        moved = (shown.pixels - alone.pixels).abs().amax((1, 2, 3))
        torch.testing.assert_close(moved, torch.tensor([0, 0.1, 0.4]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attacks": ["fgsn"]}, r"^attacks must be one of fgsm, bim, pgd, got fgsn$"),
        ({"attacks": []}, r"^attacks must name at least one of fgsm, bim, pgd$"),
        ({"targeted": ["cw"]}, r"^targeted must be one of fgsm, bim, pgd, got cw$"),
        ({"objectives": ["loss"]}, r"^objectives must be one of own, difference, got loss$"),
        ({"objectives": []}, r"^objectives must name own, difference or both for pgd$"),
        ({"epsilons": [0.1, 0.1]}, r"^epsilons must rise from 0 or more, got \[0\.1, 0\.1\]$"),
        ({"epsilons": []}, r"^epsilons must rise from 0 or more, got \[\]$"),
        ({"targeted_epsilons": [-0.1, 0.1]}, r"^targeted_epsilons must rise from 0 or more, got \[-0\.1"),
        ({"shown": [0.4, 0.1]}, r"^shown must rise from 0 or more, got"),
        ({"steps": 0}, r"^steps must be >= 1, got 0$"),
        ({"pgd_steps": 0}, r"^pgd_steps must be >= 1, got 0$"),
        ({"restarts": 0}, r"^restarts must be >= 1, got 0$"),
        ({"pictures": 0}, r"^pictures must be >= 1, got 0$"),
        ({"pgd_step_size": 0}, r"^pgd_step_size must be > 0, got 0$"),
        ({"attacks": ["pgd"], "source": "run"}, r"^source needs fgsm or bim among the attacks$"),
        (
            {"paper": {"targeted": {"epsilons": [0, 1], "cnn": {"bim": [0.5]}}}},
            r"^paper\.targeted\.cnn\.bim must have a number for each of its 2 epsilons, got 1$",
        ),
    ],
)
def test_wrong_settings_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        study(**changes)
