from lightning_mvar.cli import main

main()
