import pytest

from ovcalib.errors import DataError
from ovcalib.quantization.accuracy_search import deadline, restore_accuracy

OPERATIONS = [f"op{i}" for i in range(20)]


def search(harm, max_drop=0.01, **options):
    """A model is the set of its float operations; each quantized one costs its harm in metric and in output error."""

    def loss(floats):
        return sum(cost for name, cost in harm.items() if name not in floats)

    def error(floats):
        return loss(floats) ** 2

    calls = []

    def validate(floats):
        calls.append(len(floats))
        return 1 - loss(floats)

    found = restore_accuracy(OPERATIONS, frozenset, validate, error, 1.0, max_drop, **options)
    return found, calls


def test_nothing_is_reverted_when_the_goal_is_met_at_once() -> None:
    found, calls = search({})
    assert (found.outcome, found.reverted, calls) == ("goal-met", (), [0])


def test_one_bad_operation_is_found_and_named_first() -> None:
    found, _ = search({"op13": 0.3, "op2": 0.001})
    assert found.outcome == "goal-met"
    assert found.reverted == ("op13",)
    assert found.ranking[0][0] == "op13"
    assert found.metric == pytest.approx(0.999)
    assert found.drop == pytest.approx(0.001)


@pytest.mark.parametrize("bad", range(1, 20))
def test_the_smallest_sufficient_number_is_found(bad) -> None:
    found, calls = search(dict.fromkeys(OPERATIONS[:bad], 0.05))
    assert found.outcome == "goal-met"
    assert set(found.reverted) == set(OPERATIONS[:bad])
    # Doubling and bisection: far fewer validations than operations.
    assert len(calls) <= 11


def test_an_operation_is_ranked_while_the_others_are_in_float() -> None:
    # Leaving one out of ten bad ones changes little; alone, each shows its own harm.
    harm = {name: 0.01 * (i + 1) for i, name in enumerate(OPERATIONS[:10])}
    found, _ = search(harm, max_drop=0.0)
    assert [name for name, _ in found.ranking[:10]] == OPERATIONS[9::-1]


def test_reverting_everything_is_no_result() -> None:
    found, _ = search(dict.fromkeys(OPERATIONS, 0.05))
    assert found.outcome == "goal-missed"
    assert len(found.reverted) == 19


def test_the_best_so_far_is_given_when_iterations_run_out() -> None:
    found, calls = search(dict.fromkeys(OPERATIONS[:15], 0.05), max_iterations=2)
    assert found.outcome == "budget"
    assert calls == [0, 1, 2]
    assert len(found.reverted) == 2
    assert found.metric == pytest.approx(1 - 13 * 0.05)


def test_a_missed_goal_ends_with_the_best_metric_and_the_fewest_operations_that_have_it() -> None:
    """Two operations give back all that can be had; further ones cost, as float operations may on a real metric."""
    metrics = {0: 0.2, 1: 0.3, 2: 0.6, 4: 0.6}
    found = restore_accuracy(OPERATIONS, len, lambda m: metrics.get(m, 0.1), lambda m: 0.0, 1.0, 0.01)
    assert (found.outcome, found.metric, len(found.reverted)) == ("goal-missed", 0.6, 2)
    assert found.model == 2


def test_the_unrestored_model_is_given_when_time_runs_out_before_ranking() -> None:
    found, _ = search({"op1": 0.5}, out_of_time=lambda: True)
    assert (found.outcome, found.reverted) == ("budget", ())


def test_a_goal_that_is_met_when_time_runs_out_counts_as_met() -> None:
    ticks = iter([False] * 24 + [True] * 99)
    found, _ = search(dict.fromkeys(OPERATIONS[:3], 0.05), out_of_time=lambda: next(ticks))
    assert found.outcome == "goal-met"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_an_error(value) -> None:
    with pytest.raises(DataError, match="finite"):
        restore_accuracy(OPERATIONS, frozenset, lambda m: value, lambda m: 0.0, 1.0, 0.01)
    with pytest.raises(DataError, match="finite"):
        restore_accuracy(OPERATIONS, frozenset, lambda m: 1.0, lambda m: 0.0, value, 0.01)


def test_an_operation_whose_output_is_not_finite_is_the_worst() -> None:
    def error(floats):
        return float("nan") if "op7" not in floats else 0.1

    found = restore_accuracy(OPERATIONS, frozenset, lambda m: float("op7" in m), error, 1.0, 0.01)
    assert found.reverted == ("op7",)


def test_a_better_int8_model_meets_every_goal() -> None:
    found = restore_accuracy(OPERATIONS, frozenset, lambda m: 1.2, lambda m: 0.0, 1.0, 0.0)
    assert found.outcome == "goal-met"
    assert found.drop == pytest.approx(-0.2)


def test_deadline_by_a_scripted_clock() -> None:
    times = iter([100.0, 104.0, 105.0])
    late = deadline(5, clock=lambda: next(times))
    assert [late(), late()] == [False, True]
    assert not deadline(None)()
