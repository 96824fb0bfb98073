"""Recipes: every mistake is one UserError line before any work; order, plug-ins and the sweep grammar."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dyno import composition
from dyno.axes import AXES
from dyno.errors import UserError
from dyno.recipe import Recipe, compose, digest, expand, groups, make, option_help


def mistake(*overrides: str, plugins: list[str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        compose(list(overrides), plugins)
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_defaults_are_the_baselines_and_every_axis_has_a_technique():
    recipe = compose([])
    for axis in AXES:
        assert axis.baseline in groups()[axis.name]
        assert recipe.option(axis.name) == (axis.baseline if axis.name != "attention" else "sdpa")
        assert len(recipe.techniques[axis.name]) == 1


def test_a_recipe_whose_options_were_composed_before_is_what_hydra_makes_of_it():
    """And no value of one recipe is left in the next."""
    options = ["model=micro", "checkpointing=uniform", "data_filters=[quality_rules,exact_deduplication]"]
    values = ["model.layers=3", "checkpointing.every=2", "workload.batch=4", "seed=5", "results_dir=/tmp/elsewhere"]
    compose(options)
    before = composition._kept_options.cache_info()
    quick = [compose([*options, *some]) for some in (values, values[:2], [])]
    after = composition._kept_options.cache_info()
    assert after.hits == before.hits + 3 and after.misses == before.misses
    for recipe, some in zip(quick, (values, values[:2], []), strict=True):
        config, choices = composition.by_hydra((*options, *some))
        expected = OmegaConf.to_container(config, resolve=True)
        filters = expected.pop("data_filters")
        mine = dict(recipe.config)
        assert mine.pop("data_filters") == {name: filters[name] for name in ("quality_rules", "exact_deduplication")}
        assert mine == expected
        assert {k: v for k, v in recipe.choices.items() if k != "data_filters"} == {
            name: choices.get(name) for name in recipe.choices if name != "data_filters"
        }


def test_every_option_of_every_axis_composes_and_has_help():
    """One recipe an option index, so that all options are seen in a few compositions."""
    known = groups()
    most = max(len(known[axis.name]) for axis in AXES)
    for i in range(most):
        recipe = compose([f"{axis.name}={known[axis.name][i % len(known[axis.name])]}" for axis in AXES])
        assert all(recipe.techniques.values())
    for group, options in known.items():
        for option in options:
            assert option_help(group, option), f"conf/{group}/{option}.yaml begins with no comment"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["quantizaton=int8"], ["no axis or key 'quantizaton'", "did you mean quantization"]),
        (["quantization=int9"], ["no option 'int9'", "int8"]),
        (["model.kv_heads=3"], ["model.heads=4", "model.kv_heads=3"]),
        (["model.vocab_size=100"], ["model.vocab_size=100", "257"]),
        (["quantization=int8", "quantization.group_sz=4"], ["quantization=int8", "did you mean group_size"]),
        (["quantization.group_size=4"], ["quantization=none has no knob 'group_size'"]),
        (["data_filters=quality_rules", "data_filters.quality_rules.min_char=1"], ["'min_char'", "min_chars"]),
        (["data_filters.quality_rules.min_chars=1"], ["data_filters=none", "quality_rules"]),
        (["workload.btch=3"], ["workload=train", "did you mean batch"]),
        (["+model.layrs=1"], ["model has no knob 'layrs'", "layers"]),
        (["hardware.pue.valu=2"], ["'valu'", "value"]),
        (["quantization=int8", "quantization.group_size=abc"], ["group_size is 'abc'", "whole number"]),
        (["quantization=int8", "quantization.group_size=null"], ["group_size is None"]),
        (["quantization=int8", "quantization.symmetric=1"], ["symmetric is 1", "true or false"]),
        (["quantization=int8", "quantization.skip=5"], ["skip is 5", "list"]),
        (["parallelism=ddp", "parallelism.dp=true"], ["dp is True", "whole number"]),
        (["attention=sdpa", "attention.backend=5"], ["backend is 5", "text"]),
        (["workload.batch=2.5"], ["workload.batch is 2.5", "whole number"]),
        (["workload.batch=true"], ["workload.batch is True", "whole number"]),
        (["model.vocab_size=300.5"], ["model.vocab_size is 300.5", "whole number"]),
        (["hardware.memory_bytes=plenty"], ["hardware.memory_bytes is 'plenty'", "whole number"]),
        (["hardware.rack=5"], ["hardware.rack is 5", "mapping"]),
        (["hardware=h100", "hardware.node.gpus=null"], ["hardware.node.gpus is None", "whole number"]),
        (["model.head_dim=31"], ["model.head_dim=31", "odd"]),
        (["model.vocab_size=0"], ["model.vocab_size=0", "1 or more"]),
        (["measure.min_steps=30", "measure.max_steps=20"], ["measure.min_steps=30", "measure.max_steps=20"]),
        (["workload=generate", "workload.prompt=0"], ["workload.prompt=0", "1 or more"]),
        (["workload=generate", "workload.requests=0"], ["workload.requests=0", "1 or more"]),
        (["model.layers=abc"], ["model.layers is 'abc'"]),
        (["workload.lr=nan"], ["workload.lr is nan", "finite"]),
        (["workload.lr=inf"], ["finite"]),
        (["workload.measures=speed"], ["workload.measures=speed", "train, infer"]),
        (["workload.measures=kernel"], ["needs an op: use workload=kernel"]),
        (["seed=abc"], ["seed is 'abc'"]),
        (["seed=${nothing}"], ["nothing"]),
        (["results_dir=null"], ["results_dir"]),
        (["quantization=int8,int4"], ["several values", "dyno sweep"]),
        (["seed=interval(0,1)"], ["several values"]),
        (["quantization=[int8,int4]"], ["takes one option"]),
        (["model=[]"], ["takes one option"]),
        (["data_filters=[quality_rulez]"], ["no option 'quality_rulez'", "quality_rules"]),
        (["~model"], ["nothing can be removed"]),
        (["~quantization"], ["nothing can be removed"]),
        (["quantization"], ["is not an override"]),
        (["a=b=c"], ["is not an override"]),
        (["hydra.run.dir=x"], ["no axis or key 'hydra'"]),
        (["compile=true"], ["no option 'True'", "off, on"]),
        # a configuration names no code but techniques
        (["quantization._target_=os.system"], ["neither in dyno.techniques"]),
        (["quantization=int8", "quantization._target_=subprocess.Popen"], ["neither in dyno.techniques"]),
        (["quantization=int8", "quantization._target_=dyno.record.discard"], ["neither in dyno.techniques"]),
        (["quantization=int8", "quantization._target_=dyno.techniques.nothing.X"], ["cannot be loaded"]),
        (["quantization=int8", "quantization._target_=dyno.techniques..X"], ["_target_"]),
        (["quantization=int8", "quantization._target_=system"], ["needs a _target_"]),
        (["quantization=int8", "quantization._target_=dyno.techniques.pruning.magnitude.np"], ["_target_"]),
    ],
)  # fmt: skip
def test_mistakes(overrides, parts):
    text = mistake(*overrides)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("name", "least", "beside"),
    [
        *[(f"model.{size}", 1, []) for size in ("layers", "hidden", "ffn_width", "kv_heads", "max_seq", "rope_theta")],
        ("model.heads", 1, ["model.kv_heads=1"]), ("model.head_dim", 2, []), ("model.norm_eps", 0, []),
        ("workload.batch", 1, []), ("workload.seq", 1, []),
        *[(f"workload.{knob}", 0, []) for knob in ("steps", "lr", "eval_tokens", "checkpoint_every")],
        *[(f"workload.{knob}", 0, ["workload=eval"]) for knob in ("requests", "prompt", "new_tokens")],
        ("measure.max_steps", 1, ["measure.min_steps=1"]), ("measure.warmup_max_steps", 1, []),
        ("measure.bootstrap", 1, []), ("measure.time_limit_s", 1, []), ("measure.memory_limit_gib", 2, []),
        ("seed", 0, []), ("measure.seed", 0, []), ("tokenizer.vocab_size", 257, ["tokenizer=bpe"]),
        ("hardware.node.gpus", 1, ["hardware=h100"]), ("hardware.price_usd_per_hour.value", 0, ["hardware=h100"]),
    ],
)  # fmt: skip
def test_a_number_has_a_least(name, least, beside):
    compose([f"{name}={least}", *beside])
    assert mistake(f"{name}={least - 1}", *beside) == f"{name}={least - 1}: it is {least} or more"


def test_what_hardware_does_not_state_may_be_null():
    for word in ("price_usd_per_hour=null", "price_usd_per_hour.value=null", "peak_byte_per_s=null", "network=null"):
        compose(["hardware=h100", f"hardware.{word}"])


def test_a_list_axis_keeps_its_order():
    one = compose(["data_filters=[exact_deduplication,quality_rules]"])
    other = compose(["data_filters=[quality_rules,exact_deduplication]"])
    assert list(one.choices)[0] == "data_filters"  # columns of a table are in axis order
    assert one.choices["data_filters"] == ["exact_deduplication", "quality_rules"]
    assert other.option("data_filters") == "quality_rules+exact_deduplication"
    assert [t.name for t in one.techniques["data_filters"]] == ["ExactDeduplication", "QualityRules"]
    assert [t.name for t in other.techniques["data_filters"]] == ["QualityRules", "ExactDeduplication"]
    assert one.hash != other.hash
    carried = Recipe.from_json(json.loads(json.dumps(other.to_json())))  # as the worker gets it
    assert [t.name for t in carried.techniques["data_filters"]] == ["QualityRules", "ExactDeduplication"]
    assert carried.hash == other.hash


def test_one_way_to_say_the_same_list():
    plain, single = compose([]), compose(["data_filters=quality_rules"])
    for empty in ("data_filters=[]", "data_filters=none", "data_filters=[none]"):
        assert compose([empty]).hash == plain.hash
    for same in ("data_filters=[quality_rules]", "data_filters=[none,quality_rules]"):
        assert compose([same]).hash == single.hash
    tuned = compose(["data_filters=[quality_rules]", "data_filters.quality_rules.min_chars=7"])
    assert tuned.techniques["data_filters"][0].knobs()["min_chars"] == 7


def test_the_hash_names_what_is_measured():
    plain = compose([])
    assert compose(["results_dir=elsewhere"]).hash == plain.hash
    assert compose(["workload.batch=4"]).hash != plain.hash
    assert compose(["quantization=int8"]).hash != plain.hash
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_a_results_dir_that_looks_like_a_number_is_a_name():
    assert compose(["results_dir=2026"]).config["results_dir"] == "2026"


def words() -> st.SearchStrategy[str]:
    known = groups()
    key = st.sampled_from([*known, "seed", "results_dir", "workload.batch", "model.layers", "quantization.bits", "x"])
    option = st.sampled_from(sorted({o for options in known.values() for o in options}))
    noise = st.text("[]{}()=,.:+~@$'\"\\/ abz019-_*!?\n", max_size=12)
    value = st.one_of(
        option, noise, st.floats().map(str), st.lists(option, max_size=3).map(lambda v: f"[{','.join(v)}]")
    )
    lead = st.sampled_from(["", "", "", "+", "++", "~"])
    return st.one_of(noise, st.tuples(lead, key, st.just("="), value).map("".join), st.tuples(key, noise).map("".join))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(words(), min_size=1, max_size=2))
def test_no_override_raises_anything_but_a_user_error(overrides):
    for use in (compose, expand):
        try:
            use(overrides)
        except UserError as error:
            assert str(error).strip()


# plug-ins


def plugin(
    root: Path, name: str, *, knob: str = "amount: int = 1", code: str | None = None, yaml: str = "amount: 3"
) -> str:
    """One Python file and one YAML file."""
    conf = root / "conf" / "pruning"
    conf.mkdir(parents=True)
    (conf / f"{name}.yaml").write_text(f"# a technique of my own\n_target_: {name}_code.Mine\n{yaml}\n")
    plain = f"""
        from dataclasses import dataclass
        from dyno.technique import Technique

        @dataclass
        class Mine(Technique):
            {knob}

            def unsupported(self, recipe, device):
                return "there is nothing to prune" if self.amount > 5 else None
    """
    (root / f"{name}_code.py").write_text(textwrap.dedent(plain if code is None else code))
    return str(root)


def test_a_plugin_is_one_python_file_and_one_yaml_file(tmp_path):
    root = plugin(tmp_path / "my plug-ins, = 'quoted'", "plug_one")
    recipe = compose(["pruning=plug_one", "pruning.amount=4"], [root])
    assert recipe.techniques["pruning"][0].knobs() == {"amount": 4}
    assert "plug_one" in groups([root])["pruning"] and "plug_one" not in groups()["pruning"]
    assert option_help("pruning", "plug_one", [root]) == "a technique of my own"
    carried = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert carried.techniques["pruning"][0].name == "Mine"
    assert "no option 'plug_one'" in mistake("pruning=plug_one")
    assert "did you mean amount" in mistake("pruning=plug_one", "pruning.amont=4", plugins=[root])
    assert "whole number" in mistake("pruning=plug_one", "pruning.amount=x", plugins=[root])


def test_plugin_mistakes(tmp_path):
    assert "is not a directory" in mistake(plugins=[str(tmp_path / "nowhere")])
    broken = plugin(tmp_path / "a", "plug_broken", code="this is no Python")
    assert "cannot be loaded" in mistake("pruning=plug_broken", plugins=[broken])
    other = plugin(tmp_path / "b", "plug_other", code="class Mine: pass")
    assert "is not a Technique" in mistake("pruning=plug_other", plugins=[other])
    needy = plugin(tmp_path / "c", "plug_needy", knob="amount: int", yaml="")
    assert "needs the knob 'amount'" in mistake("pruning=plug_needy", plugins=[needy])


def test_code_outside_the_named_directories_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    with pytest.raises(UserError, match="neither in dyno.techniques"):
        make({"_target_": "evil_module.X"}, [])
    assert "evil_module" not in sys.modules


# sweeps


def test_expand():
    assert expand([]) == [[]]
    assert expand(["model=nano"]) == [["model=nano"]]
    assert expand(["quantization=none,int8", "seed=range(0,3)", "model=nano"]) == [
        [f"quantization={q}", f"seed={s}", "model=nano"] for q in ("none", "int8") for s in (0, 1, 2)
    ]
    assert expand(["precision=choice(fp32,bf16)"]) == [["precision=fp32"], ["precision=bf16"]]
    lists = expand(["data_filters=[],[quality_rules],[quality_rules,exact_deduplication]"])
    assert [compose(o).option("data_filters") for o in lists] == [
        "none", "quality_rules", "quality_rules+exact_deduplication",
    ]  # fmt: skip
    assert compose(expand(["workload.lr=1e-3,1e-4"])[1]).config["workload"]["lr"] == 1e-4


@pytest.mark.parametrize("word", ["workload.lr=interval(1e-4,1e-2)", "model=glob(*)", "seed=range(0,1,0)", "a=b=c"])
def test_expand_mistakes(word):
    with pytest.raises(UserError):
        expand([word])
