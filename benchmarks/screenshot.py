"""Take a screenshot of the top of the report, for docs/gallery.

    python benchmarks/screenshot.py report/index.html docs/gallery/report.png

Needs a Chromium on the PATH (`apt-get install chromium`); playwright only drives it.
"""

import shutil
from pathlib import Path

import click
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@click.command()
@click.argument("page", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--width", type=click.IntRange(min=1), default=1000, show_default=True, help="Of the window, in pixels.")
@click.option("--height", type=click.IntRange(min=1), default=1400, show_default=True, help="Of the window, in pixels.")
@click.option("--dark", is_flag=True, help="Use dark mode.")
def main(page: Path, picture: Path, width: int, height: int, dark: bool) -> None:
    """Open PAGE in a headless Chromium and write PICTURE, a PNG file."""
    browser_path = next(filter(None, map(shutil.which, NAMES)), None)
    if browser_path is None:
        raise click.ClickException(f"None of {', '.join(NAMES)} is on the PATH. Run apt-get install chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        window.goto(page.resolve().as_uri(), wait_until="load")
        window.screenshot(path=picture)
        browser.close()
    click.echo(picture)


if __name__ == "__main__":
    main()
