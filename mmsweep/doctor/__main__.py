import sys

from mmsweep.__main__ import quietly
from mmsweep.doctor import main

if __name__ == "__main__":
    sys.exit(quietly(main))
