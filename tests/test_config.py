"""Settings: the paper's defaults, and a refusal that names field, value and choices."""

import json

import numpy as np
import pytest
import torch

from pkt_fast import TransferConfig
from pkt_fast.errors import ConfigError


def test_defaults_are_the_papers():
    config = TransferConfig()
    assert (config.rank, config.epochs, config.batch_size) == (16, 5, 64)
    assert config.learning_rate == 3e-4
    assert (config.interface, config.objective, config.recompose) == ("mlp", "cosine", "frame")
    assert config.output_loss == "label_cosine"
    assert config.num_layers == 1


def test_every_field_has_a_description():
    assert all(len(doc) > 5 for doc in TransferConfig.fields().values())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"epochs": 0}, "epochs=0: give an integer of at least 1"),
        ({"epochs": 2.5}, "epochs=2.5"),
        ({"epochs": True}, "epochs=True"),
        ({"learning_rate": 0}, "learning_rate=0: give a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"label_smoothing": 1.0}, "up to, not including, 1"),
        ({"interface": "heads"}, "mlp, attention, block, contribution"),
        ({"recompose": "magic"}, "frame, dual, logit"),
        ({"layers": "most"}, "or 'all'"),
        ({"layers": [-1]}, "0-based target layers"),
        ({"layers": []}, "0-based target layers"),
        ({"target_modules": []}, "module names"),
        ({"learning_rte": 1e-3}, "did you mean 'learning_rate'"),
        ({"zzz": 1}, "unknown setting 'zzz'; known:"),
        ({"objective": "none", "output_loss": "none"}, "nothing to train on"),
        ({"layer_weight": 0, "output_weight": 0}, "nothing to train on"),
        ({"method": "sft", "label_weight": 0, "output_weight": 0}, "nothing to train on"),
        ({"learning_rate": 1e39}, "learning_rate=1e+39: give a number above 0, at most 1e30"),
        ({"threshold": 1.0}, "threshold=1.0: give a number from 0 up to, not including, 1"),
        ({"layers": np.array([1.5])}, "layers=array([1.5])"),
        ({"preset": "worst"}, "preset='worst'"),
        ({"store": ""}, "store=''"),
        ({"limit": 0}, "limit=0: give an integer of at least 1"),
        ({"limit": "3"}, "limit='3'"),
        ({"bucket": "no"}, "bucket='no': give True or False"),
        ({"config": 3}, "config=3: give a TransferConfig"),
        ({"seed": 2**63}, "from 0 up to 2**63 - 1"),
        ({"store": None}, "store=None"),
        ({"dtype": None}, "dtype='None'"),
    ],
)
def test_refusals_name_field_value_and_choices(setting, words):
    with pytest.raises(ConfigError) as caught:
        TransferConfig.make(**setting)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_combine_in_order(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"epochs": 2, "rank": 4, "layers": [3, 1]}))
    config = TransferConfig.make(path, rank=8)
    assert (config.epochs, config.rank, config.layers) == (2, 8, (1, 3))
    assert TransferConfig.make(config.as_dict()) == config
    assert TransferConfig.make(config, epochs=9).epochs == 9
    assert config.replace(epochs=7).epochs == 7


def test_torch_and_pathlib_values_become_strings(tmp_path):
    config = TransferConfig(dtype=torch.bfloat16, device=torch.device("cpu"), store=tmp_path)
    assert (config.dtype, config.device, config.store) == ("bfloat16", "cpu", str(tmp_path))
    json.dumps(config.as_dict())


def test_numpy_numbers_become_pythons():
    config = TransferConfig(
        epochs=np.int64(2), learning_rate=np.float32(0.5), layers=[np.int32(1)], limit=np.int8(3)
    )
    assert (config.epochs, config.learning_rate, config.layers, config.limit) == (2, 0.5, (1,), 3)
    assert TransferConfig(layers=np.array([2, 1])).layers == (1, 2)
    assert TransferConfig(layers=range(2)).layers == (0, 1)
    json.dumps(config.as_dict())


def test_bad_config_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        TransferConfig.make(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="is a directory"):
        TransferConfig.make(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        TransferConfig.make(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="give an object"):
        TransferConfig.make(tmp_path / "list.json")
