"""The pairing rule against the paper's own formulas, for every pair of depths up to 12."""

import pytest

from pkt_fast import LayerPair, pair_layers, reference
from pkt_fast.errors import ConfigError
from pkt_fast.pairing import pair_by_score, source_for, target_for

DEPTHS = [(s, t) for s in range(1, 13) for t in range(1, 13)] + [(40, 32), (32, 40), (80, 22)]


@pytest.mark.parametrize(("num_source", "num_target"), DEPTHS)
def test_pairs_equal_the_paper(num_source, num_target):
    for critical in range(num_source):
        (pair,) = pair_layers(num_source, num_target, critical)
        k, a, b, lam = reference.pair(num_source, num_target, critical + 1)
        assert pair.target == k - 1
        read = dict.fromkeys((a - 1, b - 1), 0.0)
        read[a - 1] += 1 - lam
        read[b - 1] += lam
        ours = {pair.source[0]: 1 - pair.weight}
        if len(pair.source) == 2:
            ours[pair.source[1]] = pair.weight
        assert {k: v for k, v in read.items() if v > 1e-12} == pytest.approx(ours)
        assert all(0 <= layer < num_source for layer in pair.source)


@pytest.mark.parametrize(("num_source", "num_target"), DEPTHS)
def test_single_takes_one_source_layer_for_every_target_layer(num_source, num_target):
    for k in range(1, num_target + 1):
        single = source_for(num_source, num_target, k - 1, "single")
        assert single == LayerPair(k - 1, (reference.single_source(num_source, num_target, k) - 1,))
    scores = list(range(num_source))
    pairs = pair_by_score(num_source, num_target, scores, num_target, "single")
    assert [pair.target for pair in pairs] == list(range(num_target))
    assert all(len(pair.source) == 1 for pair in pairs)
    assert len(pair_layers(num_source, num_target, num_source - 1, "single")[0].source) == 1


def test_unknown_pairing_is_refused():
    with pytest.raises(ConfigError, match="pairing='both': choose one of interpolated, single"):
        source_for(6, 4, 0, "both")


def test_whole_ratio_reads_one_layer():
    assert pair_layers(8, 4, 3) == [LayerPair(target=1, source=(3,))]


def test_fractional_ratio_interpolates():
    # k = 15: u = 18.75, so layers 18 and 19 (1-based) with λ = 0.75.
    assert source_for(40, 32, 14) == LayerPair(target=14, source=(17, 18), weight=0.75)


def test_last_source_layer_reaches_the_last_target_layer():
    assert pair_layers(40, 32, 39) == [LayerPair(target=31, source=(39,))]


def test_several_critical_layers_share_a_target():
    assert [p.target for p in pair_layers(12, 3, [0, 1, 2, 11])] == [0, 2]


def test_scores_choose_distinct_targets_in_ascending_order():
    scores = [0.0, 5.0, 4.0, 0.1, 9.0, 8.0]
    pairs = pair_by_score(6, 3, scores, 2)
    assert [p.target for p in pairs] == [0, 2]
    assert [p.target for p in pair_by_score(6, 3, scores, 3)] == [0, 1, 2]


def test_a_deeper_target_can_be_paired_in_full():
    pairs = pair_by_score(3, 7, [3.0, 2.0, 1.0], 7)
    assert [p.target for p in pairs] == list(range(7))


@pytest.mark.parametrize("critical", [-1, 6])
def test_layer_out_of_range_is_refused(critical):
    with pytest.raises(ConfigError, match="out of range"):
        pair_layers(6, 3, critical)


def test_counts_must_be_positive():
    for counts in ((0, 3), (3, 0)):
        with pytest.raises(ConfigError, match="at least one layer"):
            target_for(*counts, 0)
    with pytest.raises(ConfigError, match="scores"):
        pair_by_score(4, 2, [1.0], 1)
    with pytest.raises(ConfigError, match="num_layers=3"):
        pair_by_score(4, 2, [1.0] * 4, 3)
