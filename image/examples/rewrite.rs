//! Shows which system call sites of ELF files can be rewritten: `cargo run --example rewrite FILE...`.
//!
//! One line a site: file, address, number (if known), `rewritten` or why not.

use kiln_image::{code::Code, elf, rewrite::rewrite};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in std::env::args().skip(1) {
        let bytes = std::fs::read(&path)?;
        let elf = elf::parse(&bytes).map_err(|reason| format!("{path} {reason}"))?;
        let report = rewrite(&bytes)
            .map(|(_, report)| report)
            .unwrap_or_default();
        for site in Code::new(&bytes, &elf).sites() {
            let number = site
                .number
                .map_or("?".to_string(), |number| number.to_string());
            let outcome = match report.left.get(&site.address) {
                Some(reason) => format!("{reason:?}"),
                None if report.rewritten.contains(&site.address) => "rewritten".into(),
                None => "file left alone".into(),
            };
            println!("{path} {:#x} {number} {outcome}", site.address);
        }
    }
    Ok(())
}
