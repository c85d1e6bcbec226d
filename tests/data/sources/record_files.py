"""Writes files of records for tests, and reads them back."""
import gzip
import json

import pyarrow as pa

from t5lab.data.sources import records

ALL_BAD = dict(bad_rows=1.)


def put(path, data: bytes):
  """Writes data, packed as the name says; returns the path as text."""
  if path.name.endswith('.gz'):
    data = gzip.compress(data, mtime=0)
  elif path.name.endswith('.zst'):
    data = pa.Codec('zstd').compress(data, asbytes=True)
  path.write_bytes(data)
  return str(path)


def table(**columns):
  return pa.table({name: pa.array(values) for name, values in columns.items()})


def arrow_stream(path, data: pa.Table, batch=3):
  with pa.ipc.new_stream(path, data.schema) as out:
    out.write_table(data, max_chunksize=batch)
  return str(path)


def saved(folder, data: pa.Table, cut: int):
  """A folder as datasets 5.2.0's `save_to_disk(folder, num_shards=2)` leaves it."""
  folder.mkdir(parents=True)
  files = ['data-00000-of-00002.arrow', 'data-00001-of-00002.arrow']
  arrow_stream(folder / files[0], data.slice(0, cut))
  arrow_stream(folder / files[1], data.slice(cut))
  (folder / 'dataset_info.json').write_text('{"features": {}}')
  (folder / 'state.json').write_text(json.dumps({
      '_data_files': [{'filename': file} for file in files], '_fingerprint': 'e4758b530f619169',
      '_format_columns': None, '_format_kwargs': {}, '_format_type': None,
      '_output_all_columns': False, '_split': None}))
  return str(folder)


def read(pattern, **options):
  """[(line, fields), …], the reader"""
  reader = records.RecordReader(pattern, **options)
  return [(record.line, record.fields) for record in reader], reader
