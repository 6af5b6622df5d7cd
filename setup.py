"""Build hook: put the files of a new project into the wheel, where `pipeline init` and `pipeline preset` find them."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # an isolated build does not have the project's folder on its path

from pipeline.project import FILES, TEMPLATE  # noqa: E402

PROJECT = [*FILES, *(file.relative_to(ROOT).as_posix() for file in sorted(ROOT.glob("presets/*.yaml")))]


class BuildWithProject(build_py):
    """Copy the project's files, which are at the top of the repository, into the package."""

    def build_package_data(self) -> None:
        """Copy them into `pipeline/template`."""
        super().build_package_data()
        for file in PROJECT:
            target = Path(self.build_lib, "pipeline", TEMPLATE, file)
            self.mkpath(str(target.parent))
            self.copy_file(file, str(target))

    def get_source_files(self) -> list[str]:
        """List them for the source distribution too."""
        return [*super().get_source_files(), *PROJECT]


setup(cmdclass={"build_py": BuildWithProject})
