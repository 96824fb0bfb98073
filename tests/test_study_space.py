"""The space and the goals of a study: Hydra's sweep grammar, conditions, Pareto fronts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyno.constraints import constraint
from dyno.errors import UserError
from dyno.recipe import Recipe
from dyno.study.goals import Goals, Objective, objective
from dyno.study.space import Space, canonical, conditions, parameter

BASE = Recipe(
    {"workload": {"batch": 16, "lr": 3e-3}, "quantization": {"group_size": 64}},
    {"quantization": "none", "decoding": "greedy", "data_filters": ["a", "b"]},
)


def space(*parameters) -> Space:
    return Space(list(parameters), BASE, "cpu")


def mistake(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("choice(fp32,bf16)", ["fp32", "bf16"]),
        ("8,16", ["8", "16"]),
        ("range(2,9,2)", [2, 4, 6, 8]),
        ("range(9,2,-2)", [3, 5, 7, 9]),
        ("range(0.1,0.5,0.1)", [0.1, 0.2, 0.3, 0.4]),
        ("int(interval(3,5))", [3, 4, 5]),
        ("shuffle(range(1,4))", [1, 2, 3]),
        ("[a],[a,b]", ["[a]", "[a,b]"]),
        ("choice(off,on)", ["off", "on"]),
        ("none", ["none"]),
        ("interval(0.1,1)", None),
        ("tag(log,interval(1e-4,1e-2))", None),
    ],
)
def test_sweep_grammar(text, values):
    assert parameter("workload.batch", text).values() == values


def test_log_and_integers():
    p = parameter("workload.lr", "tag(log,interval(1e-4,1e-2))")
    assert p.log and (p.low, p.high) == (1e-4, 1e-2)
    p = parameter("workload.batch", "tag(log,int(interval(1,64)))")
    assert p.log and isinstance(p.low, int)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("range(3,3)", "holds no value"),
        ("tag(logg,interval(1,2))", "no tag 'logg'"),
        ("tag(log,interval(0,2))", "positive"),
        ("tag(log,choice(1,2))", "log is for range and interval"),
        ("tag(log,range(1,9,2))", "no step"),
        ("interval(2,1)", "smaller to a larger"),
        ("choice(", "not an override"),
        ("glob(*)", "no list of values"),
    ],
)
def test_wrong_sweeps(text, said):
    assert said in mistake(parameter, "workload.batch", text)


def test_conditions_follow_what_was_chosen():
    group = parameter("quantization.group_size", "32,64", conditions("quantization=int8,int4", ""))
    length = parameter("decoding.draft_length", "range(2,4)", conditions("decoding=speculative", ""))
    decoding = parameter("decoding", "greedy,speculative")
    made = space(group, length, parameter("quantization", "none,int4"), decoding)
    assert [p.key for p in made.parameters[:2]] == ["quantization", "decoding"]
    every = made.combinations()
    assert every is not None and len(every) == 3 * 3
    for point in every:
        assert ("quantization.group_size" in point) == (point["quantization"] == "int4")
        assert ("decoding.draft_length" in point) == (point["decoding"] == "speculative")
    assert every[0] == {"quantization": "none", "decoding": "greedy"}


def test_conditions_on_what_is_fixed_and_on_the_device():
    on_gpu = parameter("compile", "off,on", conditions("device=cuda", ""))
    never = parameter("quantization.group_size", "32,64", conditions(["quantization=int4", "device=cpu"], ""))
    made = space(on_gpu, never, parameter("decoding", "greedy,sampling"))
    assert [p.key for p in made.parameters] == ["decoding"]
    assert [p.key for p in Space([on_gpu], BASE, "cuda").parameters] == ["compile"]


def test_circular_conditions_and_wrong_ones():
    a, b = parameter("a", "1,2", conditions("b=1", "")), parameter("b", "1,2", conditions("a=1", ""))
    assert "hang on each other" in mistake(space, a, b)
    assert "write 'axis=option'" in mistake(conditions, 3, "space.x")
    assert "takes values" in mistake(conditions, "x=interval(1,2)", "space.x")


def test_the_point_of_a_recipe():
    batch, lr = parameter("workload.batch", "8,16"), parameter("workload.lr", "interval(1e-3,1e-2)")
    assert space(batch, lr).locate(BASE) == {"workload.batch": "16", "workload.lr": 3e-3}
    assert space(parameter("workload.batch", "8,32"), lr).locate(BASE) is None
    assert space(parameter("workload.batch", "8,16"), parameter("workload.lr", "3.0e-3,1")).locate(BASE) == {
        "workload.batch": "16", "workload.lr": "0.003",
    }  # fmt: skip
    assert space(parameter("data_filters", "[a],[a,b]")).locate(BASE) == {"data_filters": "[a,b]"}


def test_spelling():
    assert canonical("1e-3") == canonical("0.001") and canonical("'int8'") == canonical("int8")
    assert canonical("[a]") == canonical("a") and canonical("1") != canonical("01x")


def test_too_many_combinations_count_as_infinite():
    assert space(*[parameter(f"x{i}", "range(0,100)") for i in range(3)]).combinations() is None
    assert space(parameter("x", "range(0,4)"), parameter("y", "interval(0,1)")).combinations() is None


def test_wrong_objectives():
    assert "neither minimize nor maximize" in mistake(objective, {"metric": "x", "direction": "up"})
    assert "is not {metric" in mistake(objective, "x")


def test_missing_figures_have_their_reason():
    goals = Goals([Objective("speed", "maximize")], [constraint("loss <= 2 * baseline")])
    ok = {"status": "ok", "reason": None, "metrics": {"speed": 1.0, "loss": 3.0}, "empty": {}}
    assert goals.judge(ok, {"loss": 2.0}).feasible
    assert goals.judge(ok, {"loss": 1.0}).broken == ["loss <= 2 * baseline"]
    assert goals.judge(ok, {}).feasible  # nothing to compare with: left out
    gone = ok | {"metrics": {"sped": 1.0}}
    assert goals.judge(gone, {}).reason == "there is no metric 'speed' in this row; did you mean sped?"
    empty = ok | {"metrics": {"loss": 1.0}, "empty": {"speed": "the window was short"}}
    assert goals.judge(empty, {}).reason == "speed was not measured: the window was short"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_front_against_the_definition(points):
    goals = Goals([Objective("a", "maximize"), Objective("b", "minimize")], [])
    kept = goals.front([(i, [float(a), float(b)]) for i, (a, b) in enumerate(points)])
    for i, (a, b) in enumerate(points):
        beaten = any(x >= a and y <= b and (x, y) != (a, b) for x, y in points)
        assert (i in kept) == (not beaten)
