"""Data sets prepared by TensorFlow Datasets, read as random-access sources without TensorFlow."""

import os

from transfer_jax.data.sources import Source


def tfds_source(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Returns one split of a prepared data set.

    Nothing is downloaded. The data must have been prepared in a random-access file format
    (ArrayRecord); reading needs no TensorFlow, preparing may.

    Args:
      name: ``name``, ``name/config`` or ``name/config:version``, as TensorFlow Datasets spells it.
      split: such as "train", "test", "train[:90%]".
      data_dir: where it was prepared; by default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

    Returns:
      A source whose examples have the keys of the data set's features.

    Raises:
      FileNotFoundError: the data set is not prepared there; has the command that prepares it.
      ValueError: prepared in another file format, or no such split.
    """
    from tensorflow_datasets.core import constants, read_only_builder, registered

    directory = os.path.expanduser(os.fspath(data_dir or constants.DATA_DIR))
    command = (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{directory}', file_format='array_record')"
        '.download_and_prepare()"'
    )
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=directory)
    except registered.DatasetNotFoundError as e:
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {directory}. Prepare it, with network access "
            f"and the package tensorflow installed, by: {command}"
        ) from e
    known = list(builder.info.splits)
    if split.partition("[")[0] not in known:
        raise ValueError(f"data set {name!r} has no split {split!r}; it has {', '.join(known)}")
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as e:
        raise ValueError(
            f"data set {name!r} in {directory} has the file format {builder.info.file_format}, "
            f"which gives no random access. Prepare it in another directory by: {command}"
        ) from e
