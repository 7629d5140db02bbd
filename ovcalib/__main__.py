from ovcalib.cli import main

main()
