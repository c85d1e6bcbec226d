"""`make faults`: injects every fault (F1 to F30, S1 to S8) and prints the scorecard.

  python tests/faults/scorecard.py            # all: half an hour on two cores
  python tests/faults/scorecard.py F9 S4      # some
  python tests/faults/scorecard.py --write    # also writes docs/faults.md

A fault is passed if all of its tests passed; a skipped or missing test does not count as passed.
The exit code is 1 if any fault is not passed. The tests describe what is injected and required.
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
# They measure times, or the silence of another process, so nothing runs beside them.
ALONE = ('test_peers', 'test_signals', 'test_two_trainers', 'test_typos')

# number: (fault, {file: names of its tests, with all their parameters})
TABLE = {
    'F1': ('kill -9 in a step, at five random steps', {
        'faults/test_kills': 'killed_in_a_step'}),
    'F2': ('kill -9 in a save, ten times, 0 to 300 ms after it began', {
        'faults/test_kills': 'killed_in_a_save'}),
    'F3': ('kill -9 just before and after the commit', {
        'faults/test_kills': 'killed_at_the_commit',
        'runs/test_checkpoint': 'kill_between_leaves_only_whole_steps'}),
    'F4': ('newest step truncated', {
        'faults/test_damage': 'a_truncated_file_costs_the_steps_since_the_previous_save',
        'runs/test_checkpoint': 'falls_back_and_quarantines'}),
    'F5': ('one bit flipped, 100 trials over all files', {
        'faults/test_damage': '100_flipped_bits',
        'runs/test_checkpoint': '100_flipped_bits_are_all_detected'}),
    'F6': ('each metadata file deleted, emptied', {
        'faults/test_damage': 'each_file_of_metadata each_file_beside_the_steps',
        'runs/test_checkpoint': 'any_damaged_file_is_named_and_the_older_step_used'}),
    'F7': ('all steps damaged', {
        'faults/test_damage': 'all_steps_damaged',
        'runs/test_checkpoint': 'all_damaged_never_starts_from_scratch'}),
    'F8': ('disk full during a save: tmpfs, RLIMIT_FSIZE', {
        'faults/test_storage': 'a_disk_that_fills_during_a_save files_that_may_not_grow',
        'runs/test_checkpoint': 'full_disk_is_raised_and_leaves_the_older_step'}),
    'F9': ('SIGTERM during compilation, training, evaluation, decoding, saving, restoring', {
        'faults/test_signals':
            'sigterm_while_it_compiles sigterm_between_steps sigterm_in '
            'sigterm_while_it_restores'}),
    'F10': ('SIGTERM or SIGINT twice', {
        'faults/test_signals': 'twice_while_it_compiles twice_in',
        'runs/test_run_signals':
            'the_first_signal_sets_a_flag_and_the_second_ends_the_process '
            'the_second_signal_ends_a_main_thread_busy_in_c'}),
    'F11': ('two trainers in one directory', {
        'faults/test_two_trainers': 'the_second_is_refused_and_the_first_unaffected',
        'runs/test_lock': 'a_second_trainer_is_refused_and_the_first_unaffected'}),
    'F12': ('stale lock after kill -9', {
        'faults/test_kills': 'killed_at_the_commit',
        'runs/test_lock':
            'the_lock_of_a_killed_trainer_is_taken_over_and_logged '
            'a_forked_worker_does_not_keep_the_lock'}),
    'F13': ('resumed on 1, 2 and 4 devices, along the data and the model axis', {
        'faults/test_mesh_change':
            'the_restored_state_is_bit_equal the_run_continues_as_on_the_old_mesh '
            'from_one_to_two_to_four_devices_and_back'}),
    'F14': ('a mesh, batch size or number of heads that does not fit', {
        'faults/test_mesh_change': 'a_mesh_that_does_not_fit compilation_would_be_seen',
        'parallel/test_sharding': 'a_mesh_that_does_not_fit'}),
    'F15': ('one of two processes is killed, gets SIGTERM, is stopped, hangs', {
        'faults/test_peers':
            'one_is_killed two_processes_resume_after_one_was_killed one_gets_sigterm '
            'one_is_stopped one_is_stuck'}),
    'F16': ('NaN gradient once, K times, on one shard; infinite loss', {
        'faults/test_numbers':
            'one_bad_batch_changes_nothing a_bad_shard_counts_for_all_devices '
            'bad_batches_in_a_row_end_the_run '
            'a_killed_run_with_a_skipped_batch_equals_the_uninterrupted_one',
        'runs/test_checkpoint': 'non_finite_parameters_are_never_saved'}),
    'F17': ('loss spike', {
        'faults/test_numbers':
            'no_step_of_a_good_run_is_a_spike a_spike_is_flagged_with_its_examples'}),
    'F18': ('malformed records', {
        'data/tasks/test_bad_input':
            'each_kind_of_bad_record_is_counted_and_named past_the_limit_nothing_is_trained '
            'a_file_that_cannot_be_used_is_one_line',
        'data/sources/test_record_formats': 'bad_rows long_texts'}),
    'F19': ('not UTF-8, NUL, BOM, CRLF, lone surrogates', {
        'data/tasks/test_bad_input': 'each_kind_of_bad_record_is_counted_and_named',
        'data/sources/test_record_formats': 'bad_rows bad_records text_formats',
        'data/vocab/test_vocab': 'a_lone_surrogate_is_invalid'}),
    'F20': ('an empty file or split, nothing left after filters, less than a batch', {
        'data/tasks/test_bad_input':
            'a_split_without_usable_records '
            'few_examples_and_a_file_that_changes_between_save_and_resume '
            'a_file_that_cannot_be_used_is_one_line',
        'data/sources/test_record_formats': 'nothing_in_a_file'}),
    'F21': ('over-long sequences', {
        'data/tasks/test_bad_input': 'over_long_examples_are_cut_counted_and_keep_their_eos',
        'data/batches/test_pipeline': 'over_long_examples_are_cut_counted_and_reported'}),
    'F22': ('unknown task, feature, metric, config key', {
        'faults/test_typos': 'a_typo_is_reported_within_five_seconds',
        'data/tasks/test_bad_input': 'unknown_names_are_reported_before_data_is_read',
        'test_cli': 'an_error_is_one_line_with_its_code'}),
    'F23': ('tokenizer larger than the model, invalid ids', {
        'faults/test_other_models':
            'a_tokenizer_larger_than_the_model a_vocabulary_larger_than_the_model '
            'invalid_ids_are_refused',
        'data/tasks/test_bad_input':
            'an_id_outside_the_vocabulary_is_neither_trained_on_nor_cached'}),
    'F24': ('checkpoint with another architecture, depth, width, dtype, tying', {
        'faults/test_other_models':
            'a_checkpoint_of_another_model a_checkpoint_of_another_dtype '
            'a_counter_of_another_dtype training_from_weights_of_another_model',
        'runs/test_checkpoint': 'differences_list_paths_shapes_and_dtypes'}),
    'F25': ('crafted safetensors', {
        'tools/interop/test_tensor_files':
            'a_bad_header_is_refused a_header_beyond_the_limit_is_not_read '
            'an_index_leads_only_to_files_beside_it '
            'the_index_decides_between_two_shards_with_one_name'}),
    'F26': ('read-only directory, removed directory, clock set back', {
        'faults/test_storage':
            'a_read_only_directory a_directory_that_is_removed_during_the_run '
            'a_clock_that_was_set_back'}),
    'F27': ('data changed between save and resume', {
        'data/tasks/test_bad_input':
            'few_examples_and_a_file_that_changes_between_save_and_resume',
        'programs/test_loop': 'changed_data_is_refused_unless_allowed'}),
    'F28': ('resumed within an epoch of packed, shuffled data, at 20 random steps', {
        'data/tasks/test_bad_input':
            'a_stream_resumed_at_any_step_is_the_uninterrupted_one '
            'a_cached_stream_of_several_blocks_resumes_at_any_step'}),
    'F29': ('evaluation with an empty target, a missing prediction, a metric that raises', {
        'faults/test_evaluation_faults':
            'eval_scores_the_other_tasks training_ends_its_run_and_keeps_its_checkpoints '
            'a_prediction_that_is_missing a_good_evaluation_reports_no_error'}),
    'F30': ('200 steps, killed after every 3 to 15 s of training', {
        'faults/test_kills': '200_steps_with_a_kill_every_3_to_15_seconds'}),
    'S1': ('pickles and object arrays', {
        'tools/interop/test_tensor_files':
            'pickles_only_when_allowed a_hostile_pickle_runs_nothing hostile_npz'}),
    'S2': ('links, pipes, devices', {
        'faults/test_security': 'devices_and_links_in_a_checkpoint',
        'runs/test_checkpoint': 'links_pipes_and_second_names_are_refused',
        'tools/interop/test_tensor_files':
            'pipes_and_devices_are_refused_and_do_not_block '
            'links_may_lead_to_the_blobs_of_their_cache_and_nowhere_else'}),
    'S3': ('file names that lead elsewhere: manifest, index, zip', {
        'faults/test_security': 'names_in_a_zip',
        'runs/test_checkpoint': 'names_outside_the_step_are_refused',
        'tools/interop/test_tensor_files': 'an_index_leads_only_to_files_beside_it'}),
    'S4': ('bombs: nested JSON, huge shapes, a million leaves', {
        'faults/test_security': 'bombs_in_safetensors bombs_in_a_manifest bombs_in_a_config',
        'tools/interop/test_tensor_files': 'an_npz_may_not_expand_beyond_reason'}),
    'S5': ('code planted beside the data', {
        'faults/test_security': 'planted_code_is_not_run',
        'programs/test_own_data': 'an_own_module_is_imported_when_it_is_named'}),
    'S6': ('folders that other users can write to', {
        'faults/test_security':
            'a_compile_cache_that_others_can_write_is_not_used '
            'checkpoints_that_others_can_write_give_a_warning'}),
    'S7': ('eval, exec, pickle or shell in the source tree: none', {
        'test_laws': 'nothing_executes_what_it_reads'}),
    'S8': ('secrets of the environment in any output file', {
        'faults/test_security': 'nothing_of_the_environment_is_written'}),
}

# (label, name of the measurement, how several values are combined, unit)
LARGEST = lambda values: max(map(float, values))
MEASURES = (
    ('flipped bits that were loaded unnoticed', 'silent_corruptions', lambda v: v[-1], ''),
    ('steps lost by a SIGTERM, at most', 'steps_lost', LARGEST, ''),
    ('steps repeated after a kill -9, at most (a save every 6 steps)', 'redone_steps', LARGEST, ''),
    ('from a kill -9 to the first new step, median', 'restart_seconds',
     lambda v: statistics.median(map(float, v)), 's'),
    ('SIGTERM to exit, longest', 'exit_seconds', LARGEST, 's'),
    ('second signal to exit, longest', 'second_signal_seconds', LARGEST, 's'),
    ('second trainer refused after', 'second_trainer_seconds', LARGEST, 's'),
    ('a killed peer noticed after (heartbeat 10 s), longest', 'dead_peer_seconds', LARGEST, 's'),
    ('a stopped peer (SIGSTOP) noticed after, longest', 'stopped_peer_seconds', LARGEST, 's'),
    ('a stuck peer noticed after (guard.watchdog 20 s), longest', 'stuck_peer_seconds', LARGEST,
     's'),
    ('a typo reported after, longest', 'typo_seconds', LARGEST, 's'),
    ('kills of the 200-step soak', 'soak_kills', LARGEST, ''),
    ('its goodput: steps kept / steps computed', 'soak_goodput', LARGEST, ''),
    ('another mesh: relative error of the next loss, at most', 'next_loss_off', LARGEST, ''),
    ('another mesh: relative error of the last loss, at most', 'final_loss_off', LARGEST, ''),
    ('memory growth by the largest bomb', 'bomb_megabytes', LARGEST, 'MB'),
)


def nodes(number: str) -> list[str]:
  return [f'tests/{file}.py::test_{test}' for file, tests in TABLE[number][1].items()
          for test in tests.split()]


def run(tests: list[str], folder: Path, in_parallel: bool) -> tuple[dict, dict]:
  """Runs the tests with these node ids.

  Returns ({node id with parameters: 'passed' | 'failed' | 'skipped'}, {measurement: [values]}).
  """
  if not tests:
    return {}, {}
  report = folder / f'{"parallel" if in_parallel else "alone"}.xml'
  command = [sys.executable, '-m', 'pytest', '-m', '', '-p', 'no:randomly', f'--junitxml={report}',
             '-o', 'junit_family=xunit1', *tests]
  if in_parallel:
    command += ['-n', '2', '--dist', 'loadfile']
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
  """Returns ('passed' | 'failed' | 'skipped' | 'missing', number of its tests)."""
  verdicts = []
  for node in nodes(number):
    verdicts += [outcome for name, outcome in outcomes.items()
                 if name == node or name.startswith(node + '[')] or ['missing']
  worst = next((v for v in ('failed', 'missing', 'skipped') if v in verdicts), 'passed')
  return worst, len(verdicts)


def render(numbers, outcomes, measured, seconds) -> str:
  commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True,
                          text=True).stdout.strip() or 'unknown'
  changed = subprocess.run(['git', '--no-optional-locks', 'status', '--porcelain'], cwd=ROOT,
                           capture_output=True, text=True).stdout.strip()
  verdicts = {number: judge(number, outcomes) for number in numbers}
  faults = [v for n, (v, _) in verdicts.items() if n.startswith('F')]
  tests = [v for n, (v, _) in verdicts.items() if n.startswith('S')]
  lines = [
      '# Injected faults', '',
      f'`make faults`, {datetime.date.today().isoformat()}, commit {commit}'
      + ' with uncommitted changes' * bool(changed)
      + f', {os.cpu_count()} cores of {_processor()}, {seconds / 60:.0f} minutes. Processes are '
      'really killed, files damaged and disks filled; a run that survives a fault equals the '
      'uninterrupted run bit for bit.', '',
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
  parser.add_argument('numbers', nargs='*', metavar='F1', help='only these; default: all')
  parser.add_argument('--write', action='store_true', help=f'write {DOC.relative_to(ROOT)}')
  args = parser.parse_args()
  if unknown := [n for n in args.numbers if n not in TABLE]:
    parser.error(f'numbers must be F1 to F30 or S1 to S8, got {", ".join(unknown)}')
  numbers = args.numbers or list(TABLE)
  tests = list(dict.fromkeys(node for number in numbers for node in nodes(number)))
  alone = [node for node in tests if Path(node.partition('::')[0]).stem in ALONE]
  began = time.monotonic()
  outcomes, measured = {}, collections.defaultdict(list)
  with tempfile.TemporaryDirectory(prefix='t5lab-faults-') as folder:
    for group, in_parallel in ((alone, False), ([n for n in tests if n not in alone], True)):
      group_outcomes, group_measured = run(group, Path(folder), in_parallel)
      outcomes |= group_outcomes
      for name, values in group_measured.items():
        measured[name] += values
  text = render(numbers, outcomes, measured, time.monotonic() - began)
  print(text)
  if args.write:
    DOC.parent.mkdir(exist_ok=True)
    DOC.write_text(text)
  return 0 if all(judge(number, outcomes)[0] == 'passed' for number in numbers) else 1


if __name__ == '__main__':
  sys.exit(main())
