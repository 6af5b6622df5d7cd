"""Which code made an output."""

from pipeline import provenance
from tests.integration.project import git


def test_the_commit_is_that_of_the_code_and_not_of_the_repository_around_it(tmp_path, monkeypatch):
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "a project of the user")
    installed = tmp_path / ".venv" / "pipeline" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.git_commit() is None
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "the code")
    assert provenance.git_commit() == git(tmp_path, "rev-parse", "HEAD").strip()
