import shutil

import pytest
import torch
import yaml

from capsexp.analysis.attack import examples
from capsexp.analysis.attack.attacker import classify
from capsexp.analysis.attack.methods import gradient
from capsexp.analysis.attack.objective import own_loss
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
SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=5")  # where accuracy does not matter
STANDARDISED = ("dataset.preprocess.standardise=last",)


def settings(**changes):
    with open(f"{conf_dir()}/study/attacks.yaml") as file:
        node = yaml.safe_load(file)
    del node["_target_"]
    return node | QUICK | changes


def study(**changes):
    return Attacks(**settings(**changes))


def test_curves_begin_at_clean_accuracy_and_the_worst_is_at_most_every_other(trained_run):
    run = trained_run(limit=60)
    numbers, figures, _ = study(targeted=["bim"])(run)
    correct = torch.cat([output.scores.argmax(1) == batch.labels for batch, output in run.outputs()])
    counts = torch.cat([output.scores.argmax(1).bincount(minlength=10) for _, output in run.outputs()])
    assert (numbers["pictures"], counts.sum()) == (60, 60)
    clean = correct.float().mean().item()
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


def test_the_worst_counts_only_untargeted_attacks_on_the_network_itself(trained_run, tmp_path, train_tiny):
    run = trained_run(limit=12)
    white_box = study(attacks=["fgsm"], targeted=[])(run).numbers["untargeted"]
    changes = {
        "targeted": ["fgsm"],
        "targeted_epsilons": [0, 1.0],
        "source": other_run(tmp_path / "other", train_tiny, *SHORT, "seed=1"),
    }
    assert study(attacks=["fgsm"], **changes)(run).numbers["untargeted"] == white_box


def test_success_without_an_attack_is_the_share_predicted_as_each_class(trained_run):
    run = trained_run(limit=60)
    numbers, *_ = study(attacks=["fgsm"], targeted=["fgsm", "pgd"])(run)
    wrong = (
        sum((output.scores.argmax(1) != batch.labels).sum().item() for batch, output in run.outputs()) / 60
    )
    for attack in ("fgsm", "pgd own", "pgd difference"):
        line, others = numbers["targeted"][attack], numbers["targeted"]["wrong_classes"][attack]
        assert line[0] == pytest.approx(0.1)  # each image is predicted as one of ten
        assert others[0] == pytest.approx(wrong / 9)
        assert line[1] > line[0]
        assert line[1] - others[1] * 0.9 <= 0.1 + 1e-9  # the rest are images of the target class
    # Images that a targeted attack broke count for the worst, too.
    assert numbers["untargeted"]["worst"][2] <= numbers["untargeted"]["fgsm"][2]


def test_numbers_depend_on_the_seed_and_not_on_the_batch_size(trained_run):
    run, results = trained_run(limit=60), []
    for batch_size, seed in ((32, 0), (7, 0), (32, 1)):
        run.components.trainer.batch_size = batch_size
        numbers, *_ = study(targeted=[], epsilons=[0.04, 0.08], seed=seed, pgd_steps=1, pgd_step_size=0.01)(
            run
        )
        results.append(numbers)
    for name, line in results[0]["untargeted"].items():
        if name != "epsilons":
            assert results[1]["untargeted"][name] == pytest.approx(line)
    assert results[0]["gradients"]["own"]["mean_size"] == pytest.approx(
        results[1]["gradients"]["own"]["mean_size"]
    )
    assert results[0]["untargeted"] != results[2]["untargeted"]


def test_statistics_of_the_gradients_at_the_clean_images(trained_run):
    run = trained_run(*SHORT, limit=20)
    numbers, *_ = study(attacks=["fgsm"], targeted=[])(run)
    gradients = numbers["gradients"]
    for name in ("own", "difference"):
        assert gradients[name]["pictures_without_gradient"] == 0
        assert gradients[name]["share_exactly_zero"] < 0.5
        assert gradients[name]["mean_size"] > 0
    # Capsules of length 0 have no gradient.
    with torch.no_grad():
        run.model.class_caps.weight.zero_()
    numbers, *_ = study(attacks=["fgsm", "bim"], targeted=[])(run)
    for name in ("own", "difference"):
        assert numbers["gradients"][name] == {
            "share_exactly_zero": 1,
            "pictures_without_gradient": 1,
            "mean_size": 0,
        }
    assert numbers["untargeted"]["bim"] == [numbers["accuracy"]] * 3


def test_units_of_pixels_are_those_of_the_input_at_the_scale_of_each_image(trained_run):
    run = trained_run(*SHORT, *STANDARDISED, limit=40)
    pixels = torch.cat([batch.pixels.flatten(1).double() for batch in run.batches()])
    deviation = pixels.std(1, correction=0)
    numbers, *_ = study(attacks=["fgsm"], targeted=[], clip=False)(run)
    expected = [epsilon * 255 * deviation.mean().item() for epsilon in (0, 0.1, 0.3)]
    assert numbers["untargeted"]["epsilons"]["pixel"] == pytest.approx(expected)
    numbers, *_ = study(attacks=["fgsm"], targeted=[], units="pixel", epsilons=[0, 8, 32])(run)
    expected = [epsilon / 255 / (1 / (1 / deviation).mean().item()) for epsilon in (0, 8, 32)]
    assert numbers["untargeted"]["epsilons"]["input"] == pytest.approx(expected)
    assert numbers["untargeted"]["epsilons"]["pixel"] == [0, 8, 32]
    assert numbers["pictures_without_scale"] == 0


def test_the_papers_curves_are_drawn_beside_its_own_data_and_units_only(trained_run):
    run = trained_run(*SHORT, *STANDARDISED, limit=10)
    only = {"attacks": ["fgsm"], "targeted": [], "epsilons": [0, 0.1]}
    numbers, figures, _ = study(**only)(run)
    assert numbers["paper"] == "left out: it is on smallnorb, standardized"
    assert len(figures["attacks-untargeted"].axes[0].lines) == 3
    paper = settings()["paper"] | {"dataset": "digits"}
    numbers, figures, _ = study(**only, paper=paper)(run)
    assert numbers["paper"]["untargeted"]["capsules"]["bim"][-1] == 0.545
    assert len(figures["attacks-untargeted"].axes[0].lines) == 7
    numbers, *_ = study(**only, paper=paper, units="pixel")(run)
    assert numbers["paper"] == "left out: its unit is most likely that of the network's input"
    assert study(**only, paper=None)(run).numbers["paper"] is None


def other_run(path, train_tiny, *overrides):
    train_tiny(path, *overrides)
    (path / ".hydra").mkdir()
    shutil.copy(path / "resolved_config.yaml", path / ".hydra" / "config.yaml")
    return str(path)


def test_examples_of_a_run_on_itself_are_those_of_the_white_box(trained_run, tmp_path, train_tiny):
    run = trained_run(limit=40)
    (run.path / ".hydra").mkdir()
    shutil.copy(run.path / "resolved_config.yaml", run.path / ".hydra" / "config.yaml")
    numbers, figures, _ = study(targeted=[], source=str(run.path))(run)
    for attack in ("fgsm", "bim"):
        assert numbers["transfer"][f"{attack} on run"] == numbers["untargeted"][attack]
        assert numbers["transfer"][f"{attack} on source"] == numbers["untargeted"][attack]
    assert len(figures["attacks-transfer"].axes[0].lines) == 7
    other = other_run(tmp_path / "other", train_tiny, "seed=1")
    numbers, *_ = study(targeted=[], source=other)(run)
    source = run.other_run(other)
    white_box, *_ = study(targeted=[], attacks=["fgsm", "bim"])(source)
    for attack in ("fgsm", "bim"):
        assert numbers["transfer"][f"{attack} on source"] == white_box["untargeted"][attack]
        assert numbers["transfer"][f"{attack} on run"] != numbers["transfer"][f"{attack} on source"]


def test_a_source_that_takes_other_images_is_refused(trained_run, tmp_path, train_tiny):
    run = trained_run(*SHORT, limit=5)
    for name, overrides, message in (
        ("standardised", STANDARDISED, r"its standardise must be None, as here, got last"),
        (
            "large",
            ("dataset.preprocess.resize=10",),
            r"its image shape must be \(1, 8, 8\), as here, got \(1, 10",
        ),
    ):
        path = other_run(tmp_path / name, train_tiny, "trainer.max_epochs=1", *overrides)
        with pytest.raises(UserError, match=rf"^study\.source: {message}"):
            study(source=path)(run)
    path = other_run(tmp_path / "same", train_tiny, "trainer.max_epochs=1")
    run.components.dataset.classes = tuple("abcdefghij")
    with pytest.raises(
        UserError, match=r"^study\.source: its classes must be a, b, c, d, e, f, g, h, i, j, as"
    ):
        study(source=path)(run)
    run.components.dataset.classes = ("a", "b")
    with pytest.raises(UserError, match=r"^study\.source: its number of classes must be 2, as here, got 10$"):
        study(source=path)(run)


def test_images_of_several_classes_are_refused(trained_run):
    run = trained_run(*SHORT, limit=5)
    run.components.dataset.labels_per_image = 2
    with pytest.raises(
        UserError, match=r"^this study needs images of one class each; those of digits have 2$"
    ):
        study()(run)


def test_examples_are_correct_of_different_classes_and_attacked_with_the_given_radii(trained_run):
    run = trained_run(limit=60)
    batch = next(run.batches())
    input_gradient = gradient(own_loss(run.model, run.components.loss, run.step)(batch, None), batch.images)
    images = {}
    examples.pick(images, batch, classify(run.model, batch.images) == batch.labels, input_gradient, count=4)
    assert len(images) == 4
    for label, image in images.items():
        example = examples.attack_image(run.model, image, [0.1, 0.4], units="input", clip=True)
        assert (example.label, example.predictions[0]) == (label, label)
        torch.testing.assert_close(example.pixels[:1], image.batch.pixels)
        moved = (example.pixels - image.batch.pixels).abs().amax((1, 2, 3))
        torch.testing.assert_close(moved, torch.tensor([0, 0.1, 0.4]))


@pytest.mark.parametrize(
    ("changes", "message"),
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
            {"paper": {"dataset": "mnist", "targeted": {"epsilons": [0, 1], "cnn": {"bim": [0.5]}}}},
            r"^paper\.targeted\.cnn\.bim must have a number for each of its 2 epsilons, got \[0\.5\]$",
        ),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        study(**changes)
