"""The table of faults names tests that exist, so that a renamed test does not drop out of it."""

import pathlib
import re

import scorecard

ROOT = pathlib.Path(__file__).parents[1]


def test_every_fault_has_tests_that_exist():
  assert list(scorecard.TABLE) == [f'F{i}' for i in range(1, 31)] + [f'S{i}' for i in range(1, 9)]
  for number in scorecard.TABLE:
    assert scorecard.nodes(number)
    for node in scorecard.nodes(number):
      path, _, name = node.partition('::')
      assert re.search(rf'^def {name}\(', (ROOT / path).read_text(), re.M), f'{number}: {node}'


def test_every_test_of_the_folder_is_in_the_table():
  listed = {node for number in scorecard.TABLE for node in scorecard.nodes(number)}
  for path in (ROOT / 'tests' / 'faults').glob('test_*.py'):
    for name in re.findall(r'^def (test_\w+)\(', path.read_text(), re.M):
      assert f'tests/faults/{path.name}::{name}' in listed, f'{path.name}: {name}'


def test_verdicts():
  outcomes = {node: 'passed' for number in scorecard.TABLE for node in scorecard.nodes(number)}
  assert all(scorecard.judge(number, outcomes)[0] == 'passed' for number in scorecard.TABLE)
  first = scorecard.nodes('F1')[0]
  outcomes |= {f'{first}[0]': 'failed'}
  assert scorecard.judge('F1', outcomes) == ('failed', 2)
  del outcomes[first], outcomes[f'{first}[0]']
  assert scorecard.judge('F1', outcomes) == ('missing', 1)
  outcomes |= {f'{first}[0]': 'passed', f'{first}[1]': 'skipped'}
  assert scorecard.judge('F1', outcomes) == ('skipped', 2)
