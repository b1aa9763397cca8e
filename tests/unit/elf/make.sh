#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Makes the images here, by gcc 12.2, clang 14.0, binutils 2.40, elfutils 0.188 and dwz 0.15 of
# Debian 12. They are kept, for the tests run where these are not installed.
set -eu
cd "$(dirname "$0")"
rm -f -- *.elf *.debug *.dwo *.sup *.nm
link="-O2 -nostdlib -static -Wl,-e,outer -Wl,--build-id=sha1 -fcf-protection=none"
more="-fno-asynchronous-unwind-tables -ffile-prefix-map=$PWD=."

gcc -g $link $more source.c -o plain.elf
gcc -g $link $more -DOTHER source.c -o other.elf
cp plain.elf stripped.elf
eu-strip -f eu-strip.debug stripped.elf # whose .gnu_debuglink names the other
objcopy --only-keep-debug plain.elf objcopy.debug
objcopy --compress-debug-sections=zstd plain.elf zstd.elf
gcc -g -gz=zlib-gnu $link $more source.c -o zdebug.elf # some sections .zdebug_*, others .debug_*
cp plain.elf dwz.elf
cp other.elf dwz-other.elf
dwz -m dwz.sup dwz.elf dwz-other.elf
for compiler in gcc clang; do
    for version in 4 5; do
        name=$compiler-split-$version
        $compiler -g -gsplit-dwarf -gdwarf-$version -O2 -fcf-protection=none $more -c source.c -o "$name.o"
        gcc $link "$name.o" -o "$name.elf"
        rm "$name.o"
    done
done
# Types that have units of their own.
gcc -g -fdebug-types-section -gdwarf-4 $link $more source.c -o types-4.elf
gcc -g -fdebug-types-section -gdwarf-5 $link $more source.c -o types-5.elf
for file in plain gcc-split-4 gcc-split-5 clang-split-4 clang-split-5; do
    nm -S "$file.elf" >"$file.nm"
done
