//! `ctfs-sim`
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let outcome = ctfs_sim::storm::run(args[1].parse().unwrap(), args.len() > 2);
    println!("{} {} events, {} answered, {} at risk, {:?}", outcome.hash, outcome.events, outcome.answered, outcome.at_risk, outcome.simulated);
    for wrong in &outcome.violations { println!("VIOLATION {wrong}"); }
    std::process::exit(i32::from(!outcome.violations.is_empty()));
}
