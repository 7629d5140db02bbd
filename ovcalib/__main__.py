from ovcalib.cli.app import main

main()
