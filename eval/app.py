"""Old name of python -m gpt2repro.tools.app."""

import runpy

if __name__ == "__main__":
    runpy.run_module("gpt2repro.tools.app", run_name="__main__")
