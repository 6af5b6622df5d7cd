"""DVC's experiments: run beside the project, with the weights that only the project has, and shown in its report."""

import re
import shutil
import subprocess

from tests.conftest import REPOSITORY, invoke, write_params
from tests.integration.test_dvc import BIN, SWEEP, dvc, ran


def git(root, *arguments):
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


def test_another_timestep_as_an_experiment(tmp_path):
    for file in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(REPOSITORY / file, tmp_path)
    write_params(tmp_path, SWEEP | {"sweep.methods": ["feddifrc"]})
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(BIN)
    git(tmp_path, "init", "--quiet")
    dvc(tmp_path, "init", "--quiet")
    shutil.copytree(REPOSITORY / ".dvc" / "plots", tmp_path / ".dvc" / "plots", dirs_exist_ok=True)
    dvc(tmp_path, "repro")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "run")
    output = dvc(tmp_path, "exp", "run", "--temp", "--name", "early", "--set-param", "extract_features.timestep=100")
    assert ran(output) == {"extract-features", "analyze-features", "train-fl@feddifrc-dir05-0", "report"}
    assert invoke(tmp_path, "report", "--experiments").exit_code == 0
    page = (tmp_path / "report" / "index.html").read_text()
    table = page.partition('id="table-experiments"')[2].partition("</table>")[0]
    cells = re.findall(r"<td[^>]*>\s*([^<]*)", table)
    assert cells[0] == "here" and cells[3:5] == ["early", "extract_features.timestep = 100"]
    assert all(0 <= float(cells[position]) <= 100 for position in (2, 5))
