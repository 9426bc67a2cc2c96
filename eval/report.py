"""Old name of python -m gpt2repro.tools.report."""

import runpy

if __name__ == "__main__":
    runpy.run_module("gpt2repro.tools.report", run_name="__main__")
