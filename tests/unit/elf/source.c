/* A few functions, and types that dwz shares and -fdebug-types-section sets apart. */
typedef struct { int number; const char *text; } thing;
#ifdef OTHER
__attribute__((noinline)) int inner(int x) { __asm__ volatile("nop"); return x * 5; }
#else
__attribute__((noinline)) int inner(int x) { __asm__ volatile(""); return x * 3; }
#endif
static __attribute__((noinline, noclone, used)) int local(thing *it, long by) 
{ __asm__ volatile("" : "+r"(it), "+r"(by)); return it->number * by; }
int outer(int a, const char *s)
{
    thing it = {a, s};
    __asm__ volatile("" ::"r"(&it) : "memory");
    return inner(local(&it, 7)) + s[0];
}
