"""Where sampled images go when they are to be kept: a folder of PNGs, or an npz as the ADM suite exchanges them."""

from __future__ import annotations

import io
import itertools
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from repagen.errors import UserError
from repagen.files import TEMPORARY_PREFIX, put_file, replace_file


class SampleWriter:
    """Writes sample i as `000i.png`, or as row i of `arr_0` in an npz. Several processes write different samples.

    Args:
        path: ends with `.npz`, or is a folder.
        count: number of samples.
        continuing: an interrupted evaluation, whose samples may be there already.

    Raises:
        UserError: when the path is taken by something else.
    """

    def __init__(self, path: Path, count: int, *, continuing: bool) -> None:
        self.path = path
        self.count = count
        self.as_npz = path.suffix == ".npz"
        if not self.as_npz and path.exists() and not path.is_dir():
            raise UserError(f"--save-samples {path} is a file; name a folder, or a file that ends with .npz")
        self._rows = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.rows")
        taken = path.exists() and (self.as_npz or any(path.iterdir()))
        state = PartialState()
        if taken and not continuing and state.is_main_process:
            raise UserError(f"--save-samples {path} exists and is not empty; name a new place, or remove it")
        state.wait_for_everyone()  # before the first of them writes there
        self._digits = max(6, len(str(count - 1)))

    @property
    def place(self) -> str:
        """Where the samples go."""
        return str(self.path.absolute())

    def put(self, index: int, image: torch.Tensor) -> None:
        """Write one sample, uint8 (3, H, W); it is whole or not there."""
        (self._rows if self.as_npz else self.path).mkdir(parents=True, exist_ok=True)
        pixels, content = image.permute(1, 2, 0).contiguous().numpy(), io.BytesIO()
        if self.as_npz:
            np.save(content, pixels)
            put_file(self._row(index), content.getvalue())
            return
        Image.fromarray(pixels).save(content, format="PNG")
        put_file(self.path / f"{index:0{self._digits}d}.png", content.getvalue())

    def _row(self, index: int) -> Path:
        return self._rows / f"{index}.npy"

    def finish(self) -> None:
        """Join the rows of an npz, in order, once all samples are written; may be called again if interrupted."""
        if not self.as_npz:
            return
        rows = (np.load(self._row(index), allow_pickle=False) for index in range(self.count))
        first = next(rows)

        def write(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *first.shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for row in itertools.chain([first], rows):
                    file.write(row.tobytes())

        replace_file(self.path, write)

    def remove_rows(self) -> None:
        """Remove what an npz was joined from, once nothing can be interrupted any more."""
        shutil.rmtree(self._rows, ignore_errors=True)
