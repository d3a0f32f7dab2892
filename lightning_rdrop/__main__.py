from lightning_rdrop.cli import main

main()
