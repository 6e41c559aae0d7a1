"""Settings: what is refused, with which message; what recipes and the command line give."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings import SettingsError, fill_saved, find_recipe, keep_saved, load_recipe, parse_command, resolve
from cluster.yaml_values import read_yaml
from pipeline.config import RECIPES, FinetuneSettings, PretrainSettings, duration_in_steps
from pipeline.identity import as_begun, settings_that_decide
from pipeline.pretrain import architecture
from pipeline.proportions import check_proportions

PRETRAIN = sorted((RECIPES / "pretrain").glob("*.yaml"))
FINETUNE = sorted((RECIPES / "finetune").glob("*.yaml"))


def demo(*overrides: str) -> PretrainSettings:
    return resolve(PretrainSettings, load_recipe(RECIPES / "pretrain" / "demo.yaml"), overrides, "demo.yaml")


@pytest.mark.parametrize("path", PRETRAIN + FINETUNE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_recipes_are_valid_and_say_what_they_reproduce(path):
    kind = PretrainSettings if path.parent.name == "pretrain" else FinetuneSettings
    settings = resolve(kind, load_recipe(path), ["data.corpus=/data/corpus"])
    assert settings.run.name
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Reproduces:", "On:", "In:", "Command:"):
        assert any(word in line for line in header), word


def test_recipes_of_the_paper_have_its_numbers():
    b16 = resolve(PretrainSettings, load_recipe(RECIPES / "pretrain" / "vit-b16-imagenet21k.yaml"))
    assert (b16.optimizer.learning_rate, b16.optimizer.weight_decay, b16.model.dropout) == (1e-3, 0.03, 0.1)
    assert (b16.training.global_batch, b16.training.duration, b16.optimizer.schedule) == (4096, "90 epochs", "linear")
    h14 = resolve(PretrainSettings, load_recipe(RECIPES / "pretrain" / "vit-h14-jft.yaml"))
    assert (h14.optimizer.learning_rate, h14.optimizer.weight_decay, h14.loss.kind) == (3e-4, 0.1, "sigmoid")
    tuned = resolve(FinetuneSettings, load_recipe(RECIPES / "finetune" / "vit-paper.yaml"))
    assert (tuned.optimizer.kind, tuned.optimizer.momentum, tuned.training.global_batch) == ("sgd", 0.9, 512)
    assert (tuned.data.image_size, tuned.optimizer.warmup, tuned.training.duration) == (384, "500 steps", "20k steps")


def test_recipes_augment_as_their_sources():
    for path in PRETRAIN + FINETUNE:
        augment = load_recipe(path)["data"]["augment"]
        if path.stem not in ("demo", "small"):
            assert (augment["crop"], augment["crop_aspect"]) == ("tensorflow", [0.75, 1.33]), path
    s16 = resolve(PretrainSettings, load_recipe(RECIPES / "pretrain" / "vit-s16-imagenet1k.yaml"))
    randaugment = s16.data.augment.randaugment
    assert (randaugment.kind, randaugment.layers, randaugment.magnitude) == ("big_vision", 2, 10)
    assert s16.data.augment.mixup == 0.2


def test_recipes_resize_and_begin_as_their_sources():
    for path in PRETRAIN + FINETUNE:
        recipe = load_recipe(path)
        if path.stem not in ("demo", "small"):
            assert recipe["data"]["train_antialias"] is False, path
            assert "train_interpolation" not in recipe["data"], path  # bilinear, as all of them
        if path.parent.name == "pretrain" and path.stem not in ("demo", "small"):
            source = "big_vision" if path.stem == "vit-s16-imagenet1k" else "paper"
            assert recipe["model"]["position_init"] == source, path
    s16 = resolve(PretrainSettings, load_recipe(RECIPES / "pretrain" / "vit-s16-imagenet1k.yaml"), ["model.width=576"])
    assert architecture(s16, 10).position_std == pytest.approx(1 / 24)
    assert architecture(demo(), 10).position_std == 0.02


def test_overrides_reach_nested_keys_with_their_types():
    settings = demo(
        "optimizer.learning_rate=1e-4",
        "data.augment.crop_area=[0.5, 1.0]",
        "data.heldout=/x",
        "model.pool=gap",
        "run.workers=null",
    )
    assert settings.optimizer.learning_rate == 1e-4
    assert settings.data.augment.crop_area == (0.5, 1.0)
    assert settings.data.heldout == "/x"
    assert settings.model.pool == "gap"
    assert settings.run.workers is None


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.global_bach=3", ["'training.global_bach'", "on the command line", "'training.global_batch'"]),
        ("learning_rate=3", ["'learning_rate'", "'optimizer.learning_rate'"]),
        ("training.global_batch=big", ["training.global_batch", "'big'", "integer"]),
        ("training.global_batch=-1", ["training.global_batch", "-1", "greater than 0"]),
        ("training.duration=soon", ["training.duration", "'soon'", "90 epochs"]),
        ("model.pool=max", ["model.pool", "'max'", "cls"]),
        ("run.name=7", ["run.name", "7", "as text"]),
        ("run.name=../other", ["run.name", "'../other'"]),
        ("data.augment.crop_area=[0.9, 0.1]", ["data.augment.crop_area", "0.9", "least <= most"]),
        ("optimizer.final_learning_rate=1", ["optimizer.final_learning_rate", "optimizer.learning_rate"]),
        ("evaluation.every=1 epochs", ["evaluation.every", "data.heldout"]),
        ("data.corpus=null", ["data.corpus or data.mixture must be set, neither is"]),
        ("data.mixture=[{corpus: /a, weight: 1}]", ["data.corpus or data.mixture must be set, both are"]),
        ("data.mixture=[{corpus: /a, weigth: 1}]", ["'data.mixture.0.weigth'", "'data.mixture.0.weight'"]),
        ("data.mixture=[{corpus: /a, weight: 0}]", ["data.mixture.0.weight = 0", "greater than 0"]),
        ("data.mixture_classes=separate", ["data.mixture_classes has no effect with data.mixture = None"]),
        ("checkpoint.keep_best=heldout/top1", ["checkpoint.keep_best", "data.heldout"]),
        ("registry.checkpoint=best", ["registry.checkpoint = 'best' needs checkpoint.keep_best", "heldout/top1"]),
        ("early_stopping.patience=3", ["early_stopping.patience = 3", "evaluation.every"]),
        ("early_stopping.min_delta=0.1", ["early_stopping.min_delta has no effect with early_stopping.patience"]),
        ("registry.name=null", []),
        ("registry.alias=best", []),
        ("training.zero_stage=4", ["training.zero_stage", "4"]),
        ("nonsense", ["'nonsense'", "key.sub=value"]),
        ("optimizer.momentum=0.5", ["optimizer.momentum has no effect with optimizer.kind = 'adamw'"]),
        ("optimizer.timescale=5 steps", ["optimizer.timescale has no effect", "optimizer.schedule = 'cosine'"]),
        ("data.augment.randaugment_magnitude=5", ["randaugment_magnitude has no effect", "randaugment_layers = 0"]),
        ("data.augment.crop=squash", ["crop_area has no effect", "data.augment.crop_area=null takes it out"]),
        ("data.augment.randaugment.magnitude=5", ["randaugment.magnitude has no effect", "randaugment.kind = 'none'"]),
        ("data.augment.randaugment.kind=timm", ["data.augment.randaugment.kind", "'timm'", "torchvision"]),
        ("evaluation.batch=7", ["evaluation.batch has no effect without data.heldout"]),
        ("optimizer.betas=[1.5, 2]", ["optimizer.betas", "1.5", "less than 1"]),
        ("checkpoint.every=0 steps", ["checkpoint.every", "longer than nothing"]),
        ("model.position_init=xavier", ["model.position_init", "'xavier'", "big_vision"]),
        ("data.train_interpolation=lanczos", ["data.train_interpolation", "'lanczos'", "bicubic"]),
        ("data.cache_gb=1e308", ["data.cache_gb = 1e+308", "less than or equal to 1000000000"]),
        ("training.duration=1,5 epochs", ["training.duration", "'1,5 epochs' is not a duration"]),
    ],
)
def test_what_cannot_be_is_refused_by_name_with_what_would_do(override, parts):
    if not parts:
        demo(override)
        return
    with pytest.raises(SettingsError) as caught:
        demo(override)
    for part in parts:
        assert part in str(caught.value)


def test_combinations_are_refused():
    with pytest.raises(SettingsError, match=r"registry\.alias.*registry\.name"):
        demo("registry.name=null", "registry.alias=champion")
    with pytest.raises(SettingsError, match=r"label_smoothing.*sigmoid"):
        demo("loss.kind=sigmoid", "loss.label_smoothing=0.1")
    with pytest.raises(SettingsError, match=r"eval_resize = 8.*image_size = 16"):
        demo("data.eval_resize=8")
    with pytest.raises(SettingsError, match=r"position_antialias = true goes with position_interpolation = 'bicubic'"):
        resolve(FinetuneSettings, load_recipe(RECIPES / "finetune" / "demo.yaml"), ["position_antialias=true"])


def test_null_takes_a_key_of_the_recipe_back_to_its_default():
    settings = demo("data.augment.crop=squash", "data.augment.crop_area=null")
    assert settings.data.augment.crop_area == (0.05, 1.0)
    with pytest.raises(SettingsError, match=r"unknown key .data\.crop."):
        demo("data.crop=null")


def test_a_name_that_looks_like_a_date_is_a_name():
    assert demo("run.name=2026-01-01").run.name == "2026-01-01"


@pytest.mark.parametrize(
    "home",
    [
        "/x/hash #2",
        "/x/a #1 # 2",
        "#x",
        "/x/#2",
        "/x y/z",
        "/ü/'#' #",
        "&a /b",
        "--- /x",
        "/a\n#b",
        "/x?y=%25",
        "5 # x",
    ],
)
def test_a_text_of_the_command_line_is_taken_whole(home):
    assert demo(f"run.home={home}").run.home == home


def test_numbers_and_lists_of_the_command_line_are_still_yaml():
    settings = demo("run.workers=4", "data.augment.crop_area=[0.5, 1.0] # as in the paper", "run.home='/x #1'")
    assert (settings.run.workers, settings.data.augment.crop_area, settings.run.home) == (4, (0.5, 1.0), "/x #1")
    with pytest.raises(SettingsError, match="'4 # four'"):
        demo("run.workers=4 # four")


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(SettingsError) as caught:
        demo("model.nam=x", "training.global_batch=x")
    assert "model.nam" in str(caught.value)
    assert "training.global_batch" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        '!!int ""', "!!int _", '!!float "-"', "!!timestamp soon", "!!binary aGVsbG8=", "!!set {a}", "!!omap [a: 1]",
        "!!int 1" + ":1" * 100_000, "!!float 1" + ":1" * 100_000, '!!int "' + "9" * 5000 + '"', "!!bool perhaps",
        "!<tag:yaml.org,2002:timestamp> x", r'"half of \ud83d"', r'"/a\0b"', "!!python/name:os.system ''",
    ],
)  # fmt: skip
def test_a_value_that_is_not_what_it_is_said_to_be_is_refused(value, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run:\n  name: {value}\n")
    with pytest.raises(SettingsError, match="is not valid YAML"):
        load_recipe(recipe)
    with pytest.raises(SettingsError, match="cannot be read"):
        demo(f"run.name={value}")


def test_types_and_characters_may_be_written_out():
    assert read_yaml(r'{a: !!int "3", b: !!str 3, c: "\ud83d\ude00", d: !!float "1", e: !!null ""}') == {
        "a": 3, "b": "3", "c": "\U0001f600", "d": 1.0, "e": None,
    }  # fmt: skip


def test_recipe_files_that_cannot_be_used(tmp_path):
    twice = tmp_path / "twice.yaml"
    twice.write_text("model: {name: S/16}\nmodel: {name: B/16}\n")
    with pytest.raises(SettingsError, match="'model' stands twice"):
        load_recipe(twice)
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(SettingsError, match="not valid YAML"):
        load_recipe(broken)
    with pytest.raises(SettingsError, match="did you mean 'vit-h14-jft'"):
        find_recipe("vit-h14-jfd", RECIPES / "pretrain")


def test_command_line_help_names_every_key_and_recipe(capsys):
    with pytest.raises(SystemExit) as left:
        parse_command(PretrainSettings, prog="x.py", description="d", recipes=RECIPES / "pretrain", argv=["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "vit-s16-imagenet1k",
        "training.global_batch",
        "optimizer.learning_rate",
        "must be set",
        "default 0.001",
    ):
        assert word in text


def test_help_after_a_recipe_has_its_comment_and_its_values(capsys, tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("# Mine.\n#\n# On: a laptop.\ntraining:\n  global_batch: 24\noptimizer: {learning_rate: 0.5}\n")
    for argv in ([str(own), "--help"], [str(own), "data.corpus=/x", "-h"]):
        with pytest.raises(SystemExit) as left:
            parse_command(PretrainSettings, prog="x.py", description="d", recipes=RECIPES / "pretrain", argv=argv)
        assert left.value.code == 0
        text = capsys.readouterr().out
        assert "  Mine.\n\n  On: a laptop.\n" in text
        assert "training.global_batch  <integer>  24 by the recipe\n" in text
        assert "optimizer.learning_rate  <number>  0.5 by the recipe (default 0.001)\n" in text
        assert "training.duration  <text>  must be set" in text
        assert "optimizer: The optimizer and its learning rate over time." in text
    with pytest.raises(SettingsError, match="did you mean 'vit-h14-jft'"):
        parse_command(
            PretrainSettings, prog="x.py", description="d", recipes=RECIPES / "pretrain", argv=["vit-h14-jfd", "-h"]
        )


def test_a_command_without_its_words_says_what_is_missing():
    with pytest.raises(SettingsError, match="RECIPE must be given"):
        parse_command(
            PretrainSettings, prog="x.py", description="", recipes=RECIPES / "pretrain", argv=["data.corpus=x"]
        )
    with pytest.raises(SettingsError, match="unknown option '--lr'"):
        parse_command(
            PretrainSettings, prog="x.py", description="", recipes=RECIPES / "pretrain", argv=["demo", "--lr"]
        )


@given(st.floats(1e-12, 1e12))
def test_numbers_in_recipes_are_read_as_numbers_however_they_are_written(value):
    from cluster.settings import parse_override

    assert parse_override(f"a.b={value!r}")[1] == value
    assert parse_override(f"a.b={value:.3e}")[1] == float(f"{value:.3e}")


def test_resolved_settings_round_trip():
    settings = demo()
    assert resolve(PretrainSettings, yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))) == settings


@pytest.mark.parametrize(
    ("text", "steps"),
    [("90 epochs", 4500), ("1 epoch", 50), ("10k steps", 10000), ("1_000 steps", 1000), ("0.5 epochs", 25),
     ("1,000 steps", 1000), ("300M images", 3_000_000), ("0 steps", 0), ("1 image", 1)],
)  # fmt: skip
def test_durations_in_any_unit(text, steps):
    assert duration_in_steps(text, global_batch=100, num_samples=5000) == steps


@pytest.mark.parametrize(
    ("word", "bounds"), [("run.workers=8", (8, 8)), ("run.workers=4-16", (4, 16)), ("run.workers=null", None)]
)
def test_ranks_are_a_number_a_range_or_the_clusters(word, bounds):
    assert demo(word).run.worker_bounds == bounds


def test_a_range_of_ranks_that_is_none_is_refused():
    for text in ("16-4", "0-4", "4-", "many"):
        with pytest.raises(SettingsError, match="at least 4 and at most 16"):
            demo(f"run.workers={text}")


def test_what_nothing_would_read_about_health_is_refused():
    with pytest.raises(SettingsError, match=r"health\.max_skips has no effect with health.nonfinite = 'stop'"):
        demo("health.max_skips=3")
    with pytest.raises(SettingsError, match=r"health\.spike has no effect with health.spike_factor = None"):
        demo("health.spike=stop")
    assert demo("health.nonfinite=skip", "health.max_skips=3").health.max_skips == 3


def test_what_a_run_saved_before_a_setting_was_there_means_what_was_done_then():
    settings = demo()
    now = settings_that_decide(settings)
    then = {**now, "data": {key: value for key, value in now["data"].items() if key not in ("rules", "shuffle_window")}}
    assert (settings.data.rules, now["data"]["rules"]) == (2, 2)
    filled = fill_saved(PretrainSettings, then, now)
    assert filled["data"]["rules"] == 1  # the rules of that time
    assert filled == {**now, "data": {**now["data"], "rules": 1}}  # and what has the default of that time


def test_a_run_keeps_the_rules_that_it_began_with_unless_others_are_given():
    saved = settings_that_decide(demo())
    old = {**saved, "data": {key: value for key, value in saved["data"].items() if key != "rules"}}
    assert keep_saved(demo(), old).data.rules == 1
    assert keep_saved(demo("data.rules=2"), old).data.rules == 2  # and the checkpoint is refused
    assert keep_saved(demo(), saved).data.rules == 2
    began_with = {**saved, "data": {**saved["data"], "rules": 1}}
    assert keep_saved(demo(), began_with).data.rules == 1
    assert keep_saved(demo(), old).model_copy(update={"data": demo().data}) == demo()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.name=" + "[" * 100_000, "lists or mappings in each other"),
        ("run.name=" + "{a: " * 1000, "lists or mappings in each other"),
        ("run.name=&a [*a]", "stands inside what it names"),
        ("data.augment.crop_area=[.nan, 1]", "no number that could be used"),
        ("optimizer.learning_rate=1e999", "no number that could be used"),
        ("training.global_batch=" + "9" * 5000, "training.global_batch"),
        ("training.global_batch=1000000000000", "less than or equal to 16777216"),
        ("training.duration=" + "1" * 100_000 + " steps", "not a duration"),
        ("training.duration=" + "9" * 50 + " steps", "longer than anything"),
        ("a." * 5000 + "a=1", "not of the form key.sub=value"),
        ("training." + "x" * 100_000 + "=1", "unknown key"),
        ("run.name=!!set {a}", "type set"),
    ],
    ids=lambda text: text[:30],
)
def test_what_no_one_means_is_refused_at_once_and_in_few_words(override, message):
    with pytest.raises(SettingsError, match=re.escape(message)) as caught:
        demo(override)
    assert len(str(caught.value)) < 1500


def test_a_recipe_that_unfolds_without_end_is_refused(tmp_path):
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 40)
    )
    for text in (bomb, merges, "k: 1\n" * 300_000, "".join(f"k{n}: 1\n" for n in range(30_000)), "- " * 5000):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(SettingsError, match=r"recipe\.yaml is not valid YAML"):
            load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("key", ["width", "depth", "mlp_dim", "heads"])
def test_a_model_that_no_one_could_build_is_refused_before_it_is_built(key):
    with pytest.raises(SettingsError, match=rf"{key} = 1000000000: at most \d+ would do"):
        architecture(demo(f"model.{key}=1000000000"), num_classes=2)


def test_anchors_still_stand_for_what_they_name(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, x: 2}\n")
    same = {"x": 1, "y": [1, 2]}
    assert load_recipe(tmp_path / "recipe.yaml") == {"a": same, "b": same, "c": {**same, "x": 2}}


def shipped(name: str, *overrides: str) -> PretrainSettings:
    return resolve(PretrainSettings, load_recipe(RECIPES / "pretrain" / f"{name}.yaml"), overrides)


@pytest.mark.parametrize(
    ("recipe", "words", "parts", "eval_resize"),
    [
        # width, depth, mlp_dim, heads of the model that comes of it
        ("vit-s16-imagenet1k", ["data.image_size=32"], (384, 12, 1536, 6), 37),
        ("vit-s16-imagenet1k", ["data.image_size=448"], (384, 12, 1536, 6), 512),
        ("vit-s16-imagenet1k", ["data.image_size=32", "data.eval_resize=40"], (384, 12, 1536, 6), 40),
        ("vit-s16-imagenet1k", ["data.image_size=32", "data.eval_resize=null"], (384, 12, 1536, 6), None),
        ("vit-s16-imagenet1k", ["model.width=576"], (576, 12, 2304, 9), 256),
        ("vit-s16-imagenet1k", ["model.width=100", "model.mlp_dim=300"], (100, 12, 300, 2), 256),
        ("vit-s16-imagenet1k", ["model.width=64", "model.name=H/16"], (64, 32, 256, 1), 256),
        ("demo", ["model.width=64"], (64, 4, 128, 2), None),
        ("demo", ["model.width=64", "model.heads=8"], (64, 4, 128, 8), None),
        (
            "demo",
            ["model.width=64", "model.mlp_dim=null"],
            (64, 4, 256, 2),
            None,
        ),  # null leaves the recipe for the size
        ("demo", ["model.name=S/4"], (384, 12, 1536, 6), None),  # and not the demo's four blocks of width 128
        ("demo", ["model.name=S/4", "model.depth=2"], (384, 2, 1536, 6), None),
        ("demo", ["model.name=Ti/8"], (128, 4, 256, 4), None),
    ],
)
def test_what_follows_from_other_settings_follows(recipe, words, parts, eval_resize):
    settings = shipped(recipe, *words)
    model = architecture(settings, num_classes=2)
    assert (model.width, model.depth, model.mlp_dim, model.heads) == parts
    assert settings.data.eval_resize == eval_resize


def test_fine_tuning_at_another_resolution_takes_the_recipes_resize_along(tmp_path):
    recipe = load_recipe(RECIPES / "finetune" / "vit-paper.yaml")
    recipe["data"] |= {"image_size": 384, "eval_resize": 438}
    assert resolve(FinetuneSettings, recipe, ["data.image_size=224"]).data.eval_resize == 256


def test_what_a_recipe_says_of_the_width_is_followed_and_null_is_the_sizes_own():
    recipe = load_recipe(RECIPES / "pretrain" / "vit-s16-imagenet1k.yaml")
    recipe["model"] |= {"width": 576}
    assert architecture(resolve(PretrainSettings, recipe), 2).mlp_dim == 2304
    # as settings.json of a run of before has it
    recipe["model"] |= {"mlp_dim": None, "heads": None}
    model = architecture(resolve(PretrainSettings, recipe), 2)
    assert (model.width, model.mlp_dim, model.heads) == (576, 1536, 6)


def test_a_run_goes_on_with_what_did_not_follow_when_it_began():
    words = ["model.width=576", "data.image_size=112"]
    now = shipped("vit-s16-imagenet1k", *words)
    then = settings_that_decide(now)
    then["model"] |= {"mlp_dim": None, "heads": None}  # the size's own
    then["data"] |= {"eval_resize": 256}
    goes_on = as_begun(now, {"settings": then})
    assert settings_that_decide(goes_on) == then
    assert architecture(goes_on, 2).mlp_dim == 1536
    given = shipped("vit-s16-imagenet1k", *words, "data.eval_resize=128")
    assert as_begun(given, {"settings": then}).data.eval_resize == 128  # which the checkpoint is compared with


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["data.image_size=32", "data.eval_resize=256"],
            ["eval_resize = 256 is 8 times data.image_size = 32", "1.6 %"],
        ),
        (["model.width=100", "model.heads=3"], ["model.width = 100", "heads = 3", "2 or 4"]),
    ],
)
def test_what_makes_no_sense_together_is_refused(words, parts):
    with pytest.raises(SettingsError) as caught:
        check_proportions(shipped("vit-s16-imagenet1k", *words))
    for part in parts:
        assert part in str(caught.value)
    check_proportions(shipped("vit-s16-imagenet1k", words[0]))
