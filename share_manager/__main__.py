import sys

from share_manager.cli import main

sys.exit(main())
