"""What an installed wheel must be able to do, run outside of the repository by `make wheel`: not collected by pytest.

python tests/support/installed.py ENVIRONMENT
"""

import subprocess
import sys
from pathlib import Path

import qtensor
import qtensor.integrations.vllm
import qtensor.kernels.triton
from qtensor import LayerReport, LoadReport

environment = Path(sys.argv[1]).resolve()
package = Path(qtensor.__file__).resolve().parent
assert package.is_relative_to(environment), f"qtensor comes from {package}"
assert (package / "py.typed").is_file()
# The page's parts are data of the package.
assert "</html>" in LoadReport(layers=[LayerReport("w", "fp8", (2, 2), 4, 8)]).to_html()
found = subprocess.run([environment / "bin" / "qtensor", "doctor"], check=True, capture_output=True, text=True).stdout
assert found.endswith("All well.\n"), found
print(f"qtensor {qtensor.__version__} works from {package.relative_to(environment)}")
