"""`make faults`: runs every fault of RELIABILITY.md (F1 to F30, S1 to S8), prints the scorecard.

  python tests/faults/scorecard.py            # all of it: half an hour on two cores
  python tests/faults/scorecard.py F9 S4      # these
  python tests/faults/scorecard.py --write    # and into docs/faults.md

A fault counts as passed if all its tests passed; a skipped or missing one does not. Exit code 1 if
any did not. The tests themselves say what is done and what must hold.
"""

import argparse
import collections
import datetime
import os
from pathlib import Path
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / 'docs' / 'faults.md'
# Their pass criterion is a time, or another process' silence: nothing beside them.
ALONE = ('test_peers', 'test_signals', 'test_two_trainers', 'test_typos')

# number: (what is done, {file: tests of it, all parameters of each})
TABLE = {
    'F1': ('kill -9 in a step, at five random ones', {'faults/test_kills': 'killed_in_a_step'}),
    'F2': ('kill -9 in a save, ten times, 0 to 300 ms after its begin', {
        'faults/test_kills': 'killed_in_a_save'}),
    'F3': ('kill -9 just before and after the commit', {
        'faults/test_kills': 'killed_at_the_commit',
        'training/test_checkpoint': 'kill_between_leaves_only_whole_steps'}),
    'F4': ('newest step truncated', {
        'faults/test_damage': 'a_cut_file_costs_the_steps_since_the_save_before',
        'training/test_checkpoint': 'falls_back_and_quarantines'}),
    'F5': ('one bit flipped, 100 trials over all files', {
        'faults/test_damage': '100_flipped_bits',
        'training/test_checkpoint': '100_flipped_bits_are_all_detected'}),
    'F6': ('each file of metadata deleted, emptied', {
        'faults/test_damage': 'each_file_of_metadata each_file_beside_the_steps',
        'training/test_checkpoint': 'any_damaged_file_is_named_and_the_older_step_used'}),
    'F7': ('all steps damaged', {
        'faults/test_damage': 'all_steps_damaged',
        'training/test_checkpoint': 'all_damaged_never_starts_from_scratch'}),
    'F8': ('disk full during a save: tmpfs, RLIMIT_FSIZE', {
        'faults/test_storage': 'a_disk_that_fills_during_a_save files_that_may_not_grow',
        'training/test_checkpoint': 'full_disk_is_raised_and_leaves_the_older_step'}),
    'F9': ('SIGTERM while it compiles, trains, evaluates, decodes, saves, restores', {
        'faults/test_signals': 'sigterm_while_it_compiles sigterm_between_steps sigterm_in '
                               'sigterm_while_it_restores'}),
    'F10': ('SIGTERM or SIGINT twice', {
        'faults/test_signals': 'twice_while_it_compiles twice_in',
        'training/test_rundir': 'first_signal_asks_and_second_ends '
                                'second_signal_ends_a_main_thread_busy_in_c'}),
    'F11': ('two trainers, one directory', {
        'faults/test_two_trainers': 'the_second_is_refused_and_the_first_unaffected',
        'training/test_rundir': 'second_trainer_is_refused_and_the_first_unharmed'}),
    'F12': ('stale lock after kill -9', {
        'faults/test_kills': 'killed_at_the_commit',
        'training/test_rundir': 'lock_of_a_killed_trainer_is_taken_over_and_said '
                                'forked_worker_does_not_keep_the_lock'}),
    'F13': ('resumed on 1, 2, 4 devices, data and model swapped', {
        'faults/test_mesh_change': 'what_is_restored_is_bit_equal '
                                   'the_run_goes_on_as_on_the_old_mesh '
                                   'from_one_to_two_to_four_devices_and_back'}),
    'F14': ('a mesh, a batch, heads that do not fit', {
        'faults/test_mesh_change': 'a_mesh_that_does_not_fit compilation_would_be_seen',
        'parallel/test_sharding': 'a_mesh_that_does_not_fit'}),
    'F15': ('of two processes one is killed, told to end, stopped, stuck', {
        'faults/test_peers': 'one_is_killed what_two_lost_two_or_one_go_on_with one_is_told_to_end '
                             'one_is_stopped one_is_stuck'}),
    'F16': ('gradient NaN once, K times, on one shard; loss infinite', {
        'faults/test_numbers': 'one_bad_batch_is_as_if_it_had_not_been '
                               'a_bad_shard_counts_for_all_devices '
                               'bad_batches_in_a_row_end_the_run '
                               'a_killed_run_with_a_skipped_batch_is_the_uninterrupted_one',
        'training/test_checkpoint': 'non_finite_parameters_are_never_saved'}),
    'F17': ('loss spike', {
        'faults/test_numbers': 'no_step_of_a_sound_run_is_a_spike '
                               'a_spike_is_flagged_with_its_examples'}),
    'F18': ('malformed rows', {
        'data/test_bad_input': 'each_kind_of_bad_row_is_counted_and_named '
                               'past_the_limit_nothing_is_trained '
                               'a_file_that_cannot_be_used_is_one_line',
        'data/test_record_formats': 'bad_rows long_texts'}),
    'F19': ('not UTF-8, NUL, BOM, CRLF, lone surrogates', {
        'data/test_bad_input': 'each_kind_of_bad_row_is_counted_and_named',
        'data/test_record_formats': 'bad_rows bad_records text_formats',
        'data/test_vocab': 'lone_surrogate_is_bad_data'}),
    'F20': ('nothing in a file, a split, after filters; less than a batch', {
        'data/test_bad_input': 'a_split_of_which_nothing_is_left_is_named '
                               'fewer_examples_than_a_batch_fill_it_by_coming_again '
                               'a_file_that_cannot_be_used_is_one_line',
        'data/test_record_formats': 'nothing_in_a_file'}),
    'F21': ('over-long sequences', {
        'data/test_bad_input': 'over_long_rows_are_cut_counted_and_keep_their_end',
        'data/test_pipeline': 'over_long_examples_are_cut_counted_and_reported'}),
    'F22': ('unknown task, feature, metric, config key', {
        'faults/test_typos': 'a_typo_is_told_within_five_seconds',
        'data/test_bad_input': 'a_name_that_is_none_is_told_before_data_is_read',
        'test_cli': 'a_mistake_is_one_line_with_its_code'}),
    'F23': ('tokenizer larger than the model, ids that are none', {
        'faults/test_other_models': 'a_tokenizer_larger_than_the_model '
                                    'a_vocabulary_larger_than_the_model '
                                    'ids_that_are_none_are_refused',
        'data/test_bad_input': 'an_id_that_is_none_is_neither_trained_on_nor_cached'}),
    'F24': ('checkpoint of another architecture, depth, width, dtype, tying', {
        'faults/test_other_models': 'a_checkpoint_of_another_model a_checkpoint_of_another_dtype '
                                    'a_counter_of_another_dtype '
                                    'training_from_weights_of_another_model',
        'training/test_checkpoint': 'differences_list_paths_shapes_and_dtypes'}),
    'F25': ('crafted safetensors', {
        'interop/test_files': 'a_bad_header_is_refused a_header_beyond_the_limit_is_not_read '
                              'an_index_leads_only_to_files_beside_it '
                              'the_index_decides_between_two_shards_with_one_name'}),
    'F26': ('read-only directory; directory removed; clock set back', {
        'faults/test_storage': 'a_read_only_directory a_directory_that_is_removed_during_the_run '
                               'a_clock_that_was_set_back'}),
    'F27': ('data changed between save and resume', {
        'data/test_bad_input': 'a_file_that_changed_between_save_and_resume',
        'training/test_loop': 'changed_data_is_refused_unless_allowed'}),
    'F28': ('resumed in an epoch, packed and shuffled, at 20 random steps', {
        'data/test_bad_input': 'a_stream_that_is_resumed_anywhere_is_the_uninterrupted_one '
                               'a_cached_stream_of_several_blocks_goes_on_anywhere'}),
    'F29': ('evaluation: target empty, prediction missing, metric raises', {
        'faults/test_evaluation_faults': 'eval_scores_the_other_tasks '
                                         'training_ends_its_run_and_keeps_its_checkpoints '
                                         'a_prediction_that_is_missing '
                                         'nothing_wrong_is_nothing_said'}),
    'F30': ('200 steps, killed every 3 to 15 s of training', {
        'faults/test_kills': '200_steps_with_a_kill_every_3_to_15_seconds'}),
    'S1': ('pickles and object arrays', {
        'interop/test_files': 'pickles_only_when_allowed a_hostile_pickle_runs_nothing '
                              'hostile_npz'}),
    'S2': ('links, pipes, devices', {
        'faults/test_security': 'devices_and_links_in_a_checkpoint',
        'training/test_checkpoint': 'links_pipes_and_second_names_are_refused',
        'interop/test_files': 'pipes_and_devices_are_refused_and_do_not_block '
                              'links_may_lead_to_the_blobs_of_their_cache_and_nowhere_else'}),
    'S3': ('names that lead out: manifest, index, zip', {
        'faults/test_security': 'names_in_a_zip',
        'training/test_checkpoint': 'names_outside_the_step_are_refused',
        'interop/test_files': 'an_index_leads_only_to_files_beside_it'}),
    'S4': ('bombs: JSON, shapes, leaves', {
        'faults/test_security': 'bombs_in_safetensors bombs_in_a_manifest bombs_in_a_config',
        'interop/test_files': 'an_npz_may_not_expand_beyond_reason'}),
    'S5': ('code planted beside data', {
        'faults/test_security': 'planted_code_is_not_run',
        'test_own_data': 'a_module_of_ones_own_is_imported_when_it_is_named'}),
    'S6': ('folders that others may write', {
        'faults/test_security': 'a_compile_cache_that_others_may_write_is_not_used '
                                'checkpoints_that_others_may_write_are_warned_of'}),
    'S7': ('no eval, exec, pickle, shell in the tree', {
        'test_laws': 'nothing_executes_what_it_reads'}),
    'S8': ('secrets of the environment in what is written', {
        'faults/test_security': 'nothing_of_the_environment_is_written'}),
}

# (label, name of the measurement, how several become one, unit)
LARGEST = lambda values: max(map(float, values))
MEASURES = (
    ('bits flipped, loaded without notice', 'silent_corruptions', lambda v: v[-1], ''),
    ('steps lost by a SIGTERM, most', 'steps_lost', LARGEST, ''),
    ('steps done again after a kill -9, most (a save every 6)', 'redone_steps', LARGEST, ''),
    ('from a kill -9 to the first new step, median', 'restart_seconds',
     lambda v: statistics.median(map(float, v)), 's'),
    ('SIGTERM to exit, longest', 'exit_seconds', LARGEST, 's'),
    ('second signal to exit, longest', 'second_signal_seconds', LARGEST, 's'),
    ('second trainer refused after', 'second_trainer_seconds', LARGEST, 's'),
    ('a killed peer noticed after (heartbeat 10 s), longest', 'dead_peer_seconds', LARGEST, 's'),
    ('a stopped peer (SIGSTOP) noticed after, longest', 'stopped_peer_seconds', LARGEST, 's'),
    ('a stuck peer noticed after (guard.watchdog 20 s), longest', 'stuck_peer_seconds', LARGEST,
     's'),
    ('a typo told after, longest', 'typo_seconds', LARGEST, 's'),
    ('kills of the 200-step soak', 'soak_kills', LARGEST, ''),
    ('its goodput: steps that stayed / steps computed', 'soak_goodput', LARGEST, ''),
    ('another mesh: next loss off by, relatively, most', 'next_loss_off', LARGEST, ''),
    ('another mesh: last loss off by, most', 'final_loss_off', LARGEST, ''),
    ('memory of the largest bomb', 'bomb_megabytes', LARGEST, 'MB'),
)


def nodes(number: str) -> list[str]:
  return [f'tests/{file}.py::test_{test}' for file, tests in TABLE[number][1].items()
          for test in tests.split()]


def run(wanted: list[str], folder: Path, together: bool) -> tuple[dict, dict]:
  """Runs node ids -> ({node id with parameters: 'passed' | 'failed' | 'skipped'},
  {measurement: [values]})."""
  if not wanted:
    return {}, {}
  report = folder / f'{"together" if together else "alone"}.xml'
  command = [sys.executable, '-m', 'pytest', '-m', '', '-p', 'no:randomly', f'--junitxml={report}',
             '-o', 'junit_family=xunit1', *(['-n', '2', '--dist', 'loadfile'] if together else []),
             *wanted]
  subprocess.run(command, cwd=ROOT, env=os.environ | {'T5LAB_FAULTS_DIR': str(folder)})
  outcomes, measured = {}, collections.defaultdict(list)
  for case in ElementTree.parse(report).iter('testcase') if report.exists() else ():
    kinds = {child.tag for child in case}
    outcome = ('failed' if kinds & {'failure', 'error'} else
               'skipped' if 'skipped' in kinds else 'passed')
    outcomes[f'{case.get("file")}::{case.get("name")}'] = outcome
    for item in case.iter('property'):
      measured[item.get('name')].append(item.get('value'))
  return outcomes, measured


def judge(number: str, outcomes: dict) -> tuple[str, int]:
  """('passed' | 'failed' | 'skipped' | 'missing', how many tests it has)."""
  found = []
  for node in nodes(number):
    mine = [o for name, o in outcomes.items() if name == node or name.startswith(node + '[')]
    found += mine or ['missing']
  return next((o for o in ('failed', 'missing', 'skipped') if o in found), 'passed'), len(found)


def render(numbers, outcomes, measured, seconds) -> str:
  commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True,
                          text=True).stdout.strip() or 'unknown'
  changed = subprocess.run(['git', '--no-optional-locks', 'status', '--porcelain'], cwd=ROOT,
                           capture_output=True, text=True).stdout.strip()
  verdicts = {number: judge(number, outcomes) for number in numbers}
  faults = [v for n, (v, _) in verdicts.items() if n.startswith('F')]
  tests = [v for n, (v, _) in verdicts.items() if n.startswith('S')]
  lines = [
      '# Faults, injected', '',
      f'`make faults`, {datetime.date.today().isoformat()}, commit {commit}'
      + ' with uncommitted changes' * bool(changed)
      + f', {os.cpu_count()} cores of {_processor()}, {seconds / 60:.0f} minutes. Processes are '
      'killed, files damaged and disks filled for real; a run that survived equals the '
      'uninterrupted one bit for bit.', '',
      '| measure | |', '|---|---|',
      f'| recovery score | {faults.count("passed")}/{len(faults)} |',
      f'| security tests passed | {tests.count("passed")}/{len(tests)} |']
  for label, name, combine, unit in MEASURES:
    if measured.get(name):
      value = combine(measured[name])
      shown = f'{value:.3g}' if isinstance(value, float) else value
      lines.append(f'| {label} | {shown} {unit}'.rstrip() + ' |')
  lines += ['', '| | fault | verdict | tests | where |', '|---|---|---|---|---|']
  for number in numbers:
    verdict, count = verdicts[number]
    where = ', '.join(f'`{file}`' for file in TABLE[number][1])
    lines.append(f'| {number} | {TABLE[number][0]} | {verdict} | {count} | {where} |')
  bad = [f'{name}: {outcome}' for name, outcome in outcomes.items() if outcome != 'passed']
  if bad:
    lines += ['', 'Not passed:', '', *(f'- `{line}`' for line in bad)]
  return '\n'.join(lines) + '\n'


def _processor() -> str:
  try:
    for line in Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  except OSError:
    pass
  return platform.machine()


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('numbers', nargs='*', metavar='F1', help='these only; default: all')
  parser.add_argument('--write', action='store_true', help=f'write {DOC.relative_to(ROOT)}')
  args = parser.parse_args()
  if unknown := [n for n in args.numbers if n not in TABLE]:
    parser.error(f'no fault {", ".join(unknown)}; there are F1 to F30 and S1 to S8')
  numbers = args.numbers or list(TABLE)
  wanted = list(dict.fromkeys(node for number in numbers for node in nodes(number)))
  alone = [node for node in wanted if Path(node.partition('::')[0]).stem in ALONE]
  began = time.monotonic()
  outcomes, measured = {}, collections.defaultdict(list)
  with tempfile.TemporaryDirectory(prefix='t5lab-faults-') as folder:
    for group, together in ((alone, False), ([n for n in wanted if n not in alone], True)):
      found, numbers_found = run(group, Path(folder), together)
      outcomes |= found
      for name, values in numbers_found.items():
        measured[name] += values
  text = render(numbers, outcomes, measured, time.monotonic() - began)
  print(text)
  if args.write:
    DOC.parent.mkdir(exist_ok=True)
    DOC.write_text(text)
  return 0 if all(judge(number, outcomes)[0] == 'passed' for number in numbers) else 1


if __name__ == '__main__':
  sys.exit(main())
