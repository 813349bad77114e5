//! Lets `getrandom` be found by those who look for it at run time (`src/machine/system.rs`).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg=-Wl,--export-dynamic-symbol=getrandom");
    println!("cargo:rustc-link-arg=-Wl,--export-dynamic-symbol=clock_gettime");
    println!("cargo:rustc-link-arg=-Wl,--export-dynamic-symbol=syscall");
}
