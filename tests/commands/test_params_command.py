"""`t5lab params`: shapes, axes and counts, without allocating anything."""

import json
import pathlib

import pytest

from t5lab import cli

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
QUICKSTART = str(CONFIGS / 'quickstart.py')


def call(*argv, capsys):
  code = cli.main(['params', *argv])
  out = capsys.readouterr()
  return code, out.out, out.err


def test_a_line_for_each_parameter_and_the_total(capsys):
  code, out, _ = call('--config', QUICKSTART, '--config.rules=fsdp_tp', capsys=capsys)
  assert code == 0
  line, = [line for line in out.splitlines() if line.startswith('encoder/layers/mlp/wi_0/kernel ')]
  assert line.split()[1:6] == ['262,144', 'float32', '2', '256', '512']
  assert line.endswith('layers, embed → dcn_fsdp+fsdp, mlp → model')
  # embedding 2048 * 256; in each layer attention 4 * 256^2 (the decoder has two), mlp 3 * 256 * 512
  assert '3,673,344 parameters (decoder 1,836,928, embedding 524,288, encoder 1,312,128)' in out


def test_json_of_a_model_that_no_machine_here_could_hold(capsys):
  code, out, _ = call('--config', str(CONFIGS / 't5_1_1_xxl_c4.py'), '--json', capsys=capsys)
  table = json.loads(out)
  assert code == 0 and table['total'] == 11_135_332_352            # T5 1.1 XXL
  assert sum(row['count'] for row in table['parameters']) == table['total']
  embedding, = [row for row in table['parameters'] if row['path'] == 'embedding']
  assert embedding['shape'] == [32128, 4096] and embedding['axes'] == ['vocab', 'embed']


@pytest.mark.parametrize('argv', [(), ('--config', QUICKSTART, '--workdir', 'x')])
def test_one_source_is_needed(argv, capsys):
  code, _, err = call(*argv, capsys=capsys)
  assert code == 2 and 'needs --config or --workdir' in err and err.count('\n') == 1


def test_a_mesh_axis_is_given_to_one_dimension_as_in_training(capsys):
  """Rules ep map `expert` and `embed` to the mesh axis expert: an expert's kernel uses it once."""
  code, out, _ = call('--config', QUICKSTART, '--config.rules=ep', '--config.model.experts=4',
                      '--json', capsys=capsys)
  assert code == 0
  kernels = {row['path']: row for row in json.loads(out)['parameters']}
  kernel, = [row for path, row in kernels.items()
             if path.startswith('encoder/') and path.endswith('experts/wi_0')]
  assert dict(zip(kernel['axes'], kernel['mesh_axes'])) == {
      'layers': [], 'expert': ['expert'], 'embed': ['dcn_fsdp', 'fsdp'], 'mlp': ['model']}
