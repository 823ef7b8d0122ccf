"""Build the wheel: copy the operation (inplace_ttt/ttt) and the exported model's file into this package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "inplace_ttt_vllm"
OPERATION = Path(__file__).resolve().parent.parent / "inplace_ttt"


class BuildWithOperation(build_py):
    """Add the files to the package, with their imports renamed."""

    def run(self):
        super().run()
        exported = OPERATION / "hf/modeling_inplace_ttt.py"
        files = [OPERATION / "operation.py", exported, *(OPERATION / "ttt").rglob("*.py")]
        for source in files:
            target = Path(self.build_lib, PACKAGE, source.relative_to(OPERATION))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(
                source.read_text(encoding="utf-8").replace("inplace_ttt.", f"{PACKAGE}."), encoding="utf-8"
            )


setup(cmdclass={"build_py": BuildWithOperation})
